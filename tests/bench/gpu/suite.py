"""Suite: the tests of the kernels, run on the device.

Owns the call of pytest and the reading of its last words. Knows no test.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from tests.bench.gpu.setting import Setting

PROCESSES = 14
_COUNT = re.compile(r"(\d+) (passed|failed|errors?|skipped|xfailed|warnings?)")


def suite(setting: Setting) -> Iterator[dict[str, Any]]:
    """`passed`, `failed` and whatever else pytest counts, and its last lines."""
    what = (
        ["tests/kernels/test_choice.py", "-n", "0"]
        if setting.tiny
        else ["tests/kernels", "-n", str(PROCESSES)]
    )
    command = [sys.executable, "-m", "pytest", *what, "--confcutdir", "tests/kernels", "-q", "-m", ""]
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=setting.seconds,
            env={**os.environ, "OMP_NUM_THREADS": "1"},  # so many processes share the cores
        )
    except subprocess.TimeoutExpired as cut:
        said = cut.output or b""
        text = said.decode(errors="replace") if isinstance(said, bytes) else said
        yield {"cut": True, "said": text.splitlines()[-30:]}
        return
    lines = done.stdout.splitlines()
    counts = {what: int(count) for count, what in _COUNT.findall(lines[-1] if lines else "")}
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))][:40]
    yield {
        "passed": 0,
        "failed": 0,
        **counts,
        "exit": done.returncode,
        "failures": failures,
        "said": lines[-5:],
    }
