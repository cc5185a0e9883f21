"""Side: one engine of a comparison, ours or a peer, and how one run of it is made.

Owns the command, the environment variables and what becomes of the child's line. Each run is a process of its own, so
that every one begins with empty caches; one that fails gives its reason instead of figures.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.bench.peers.environment import OPENVINO, TRANSFORMERS, VLLM, Recipe, python_of
from tests.bench.peers.once import Unavailable, ran
from tests.bench.peers.weights import OFFLINE, RUNNERS, openvino, plain

ROOT: Final = Path(__file__).resolve().parents[3]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One measured call. `seconds` of it alone; `start_up_seconds` from the start of the process to ready."""

    seconds: float
    output_tokens: int
    start_up_seconds: float
    cpu_seconds: float  # of the process that was started; vLLM computes in another
    dtype: str
    notes: list[str]
    versions: dict[str, str]

    @property
    def tokens_per_second(self) -> float:
        return self.output_tokens / self.seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    name: str
    python: Path
    script: Path
    model: Path
    dtype: str = "bfloat16"
    environment: Mapping[str, str] = field(default_factory=dict)

    def run(self, workload: Path, *, cwd: Path, timeout: float) -> Run:
        """Raises `Unavailable` with the reason when there is no figure."""
        command = [str(self.python), str(self.script), str(workload), "--model", str(self.model)]
        command += ["--dtype", self.dtype, "--started", repr(time.monotonic())]
        # Another environment's modules must not be found, ours least of all.
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        printed = ran(
            command, cwd=cwd, timeout=timeout, environment=inherited | OFFLINE | dict(self.environment)
        )
        return Run(**_line(printed))


def _line(printed: str) -> dict[str, Any]:
    """The last line that is a JSON object: engines print as well."""
    for line in reversed(printed.splitlines()):
        if line.startswith("{"):
            found: dict[str, Any] = json.loads(line)
            return found
    raise Unavailable("it ended without a result")


def ours(source: Path, cache: Path, dtype: str, guessed: int | None = None) -> Side:
    """`guessed`: tokens guessed at most, None: as many as by default."""
    environment = {"PYTHONPATH": str(ROOT)}
    if guessed is not None:
        environment["NUM_SPECULATIVE_TOKENS"] = str(guessed)
    return Side(
        name="ours",
        python=Path(sys.executable),
        script=RUNNERS / "ours.py",
        model=plain(source, cache),
        dtype=dtype,
        environment=environment,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    recipe: Recipe
    script: str
    openvino: bool = False  # reads OpenVINO's format
    environment: Mapping[str, str] = field(default_factory=dict)

    def side(self, name: str, source: Path, cache: Path, dtype: str) -> Side:
        """The peer ready to run; what it needs is made where it is missing. Raises `Unavailable`."""
        return Side(
            name=name,
            python=python_of(self.recipe, cache),
            script=RUNNERS / self.script,
            model=(openvino if self.openvino else plain)(source, cache),
            dtype=dtype,
            # its compiled steps: the first start makes them, the others read them
            environment={"VLLM_CACHE_ROOT": str(cache / "vllm"), **self.environment},
        )


PEERS: Final[dict[str, Peer]] = {
    "openvino": Peer(recipe=OPENVINO, script="openvino_genai_batching.py", openvino=True),
    "vllm": Peer(
        recipe=VLLM,
        script="vllm_cpu.py",
        environment={
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}",  # else it leaves a core idle
            "VLLM_CPU_KVCACHE_SPACE": "4",  # GiB
            "VLLM_NO_USAGE_STATS": "1",
        },
    ),
    "transformers": Peer(recipe=TRANSFORMERS, script="transformers_generate.py"),
}
