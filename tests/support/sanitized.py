"""The kernel suite under NVIDIA's compute-sanitizer, on a machine with a GPU: `python -m tests.support.sanitized`.

A process per tool and test file, since the sanitizer does not follow pytest's own processes; of each test the cases
that `make test` runs, too. memcheck finds accesses out of bounds, for which torch must not pool its memory; racecheck
finds races in shared memory. Prints what each found, then one line of JSON; a fault or a failed test makes it exit
with 1. Knows no test.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import NamedTuple

from tests.support.tree import ROOT

TOOLS = ("memcheck", "racecheck")
PYTEST = ("-p", "no:benchmark", "-p", "no:cacheprovider", "--confcutdir", "tests/kernels", "-q")
CASES = ("-m", "not interpreted", "-k", "(triton or norm_rope_store) and not ahead")
NOTHING_RUN = 5  # pytest's status for it
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}
_FAULTS = re.compile(r"(?:ERROR SUMMARY: (\d+) error)|(?:RACECHECK SUMMARY: (\d+) hazard)")
_PASSED = re.compile(r"(\d+) passed")


class Found(NamedTuple):
    """`faults`: None, where the sanitizer came to no end. `status`: pytest's."""

    tool: str
    file: str
    passed: int
    faults: int | None
    status: int
    said: str

    @property
    def clean(self) -> bool:
        return self.status == NOTHING_RUN or (self.status == 0 and self.faults == 0)


def faults_in(log: str) -> int | None:
    """What the sanitizer counts at its end: errors or hazards."""
    counts = [int(errors or hazards) for errors, hazards in _FAULTS.findall(log)]
    return counts[-1] if counts else None


def passed_in(output: str) -> int:
    """What pytest counts in its last line."""
    counts = _PASSED.findall(output)
    return int(counts[-1]) if counts else 0


def chose_nothing(output: str) -> bool:
    """Of a file without such tests. The sanitizer's own status then says that no GPU was used."""
    last = output.splitlines()[-1:] or [""]
    return re.match(r"\d+ deselected|no tests ran", last[0].strip("= ")) is not None


def sanitized(tool: str, file: Path, seconds: float) -> Found:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = [
            "compute-sanitizer", "--tool", tool, "--log-file", str(log),
            sys.executable, "-m", "pytest", str(file), *PYTEST, *CASES,
        ]  # fmt: skip
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **ENVIRONMENT},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = child.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)  # the sanitizer's own child too
            child.communicate()
            return Found(tool, file.name, 0, None, -1, f"it did not end within {seconds:.0f} s")
        said = log.read_text() if log.exists() else ""
    status = NOTHING_RUN if chose_nothing(output) else child.returncode
    return Found(tool, file.name, passed_in(output), faults_in(said), status, said + output[-2000:])


def all_of(tools: list[str], processes: int, seconds: float) -> Iterator[Found]:
    files = sorted((ROOT / "tests" / "kernels").glob("test_*.py"))
    with ThreadPoolExecutor(processes) as pool:
        yield from pool.map(lambda pair: sanitized(*pair, seconds), product(tools, files))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tools", nargs="*", default=list(TOOLS), help=", ".join(TOOLS))
    parser.add_argument("--processes", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=240, help="for one file")
    args = parser.parse_args()
    if unknown := set(args.tools) - set(TOOLS):
        parser.error(f"no such tool: {', '.join(sorted(unknown))}; there are {', '.join(TOOLS)}")
    if shutil.which("compute-sanitizer") is None:
        parser.error("compute-sanitizer is not on the path: it comes with CUDA")
    passed, bad = dict.fromkeys(args.tools, 0), []
    for found in all_of(args.tools, args.processes, args.seconds):
        passed[found.tool] += found.passed
        if found.passed or not found.clean:
            print(
                f"{found.tool:9} {found.file:28} {found.passed:4} passed, faults: {found.faults}", flush=True
            )
        if not found.clean:
            bad.append(f"{found.tool} {found.file}")
            print(found.said, flush=True)
    print(json.dumps({"passed": passed, "bad": bad}))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
