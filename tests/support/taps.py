"""Tap: what the engine processes of a story really generated, and how to poison one (tests/support/tap)."""

from __future__ import annotations

from pathlib import Path

from tests.support.tap.sitecustomize import POISON, STEP
from tests.support.tree import ROOT

__all__ = ["POISON", "Tap"]


class Tap:
    """`death`: what a poisoned request does to its engine process: `exit`, `kill` or nothing."""

    def __init__(self, file: Path, death: str = "") -> None:
        self._file = file
        self.environment = {
            "PYTHONPATH": f"{ROOT}:{Path(__file__).parent / 'tap'}",
            "TAP_FILE": str(file),
            "TAP_DEATH": death,
        }

    def break_device(self, how: str = "ends") -> None:
        """From now on every step `ends` the engine process it is made in, or `hangs`."""
        Path(f"{self._file}.broken").write_text(how)

    @property
    def num_generated(self) -> int:
        """Tokens made by all engine processes so far, those that were lost included."""
        return sum(count for _, count in self._steps())

    def num_generated_since(self, moment: float) -> int:
        """The same from a `time.monotonic()` on, which all processes share."""
        return sum(count for at, count in self._steps() if at >= moment)

    def _steps(self) -> list[tuple[float, int]]:
        steps = self._file.read_bytes() if self._file.exists() else b""
        return list(STEP.iter_unpack(steps))
