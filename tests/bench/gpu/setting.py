"""Setting: under what one section of the benchmark runs.

Owns what the command line says to every section, and its way from one process to another. Knows no section.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """`tiny`: shapes that a CPU computes in a moment, to find faults and not to measure anything. `share`: of the
    output lengths of workloads. `seconds`: after so many a section is to stop by itself and tell what it has.
    `copy_rate`, `product_rate`: the ceilings, in bytes and FLOP per second; None before they are measured."""

    device: str
    tiny: bool
    share: float
    seconds: float
    copy_rate: float | None = None
    product_rate: float | None = None

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def kernels(self) -> str:
        """The kernel set that is measured."""
        return "triton" if self.on_gpu else "reference"

    @property
    def rates(self) -> tuple[float, float]:
        """(bytes, FLOP) per second. Raises `ValueError` before they are measured."""
        if self.copy_rate is None or self.product_rate is None:
            raise ValueError("the ceilings are not measured yet")
        return self.copy_rate, self.product_rate

    def text(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def of(cls, text: str) -> Setting:
        return cls(**json.loads(text))
