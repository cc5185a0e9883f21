"""Section: one part of the benchmark, in a process of its own: `python -m tests.bench.gpu.section NAME SETTING FILE`.

Owns the names of the sections and the file in which one leaves what it has found. A section that breaks the device,
or does not end, harms only itself; what it found before is in the file.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from tests.bench.gpu.setting import Setting


class Section(NamedTuple):
    """`place`: module and function, which yields its growing result. `seconds`: after which it is stopped."""

    place: str
    seconds: float

    def run(self, setting: Setting) -> Iterator[dict[str, Any]]:
        module, _, name = self.place.partition(":")
        found: Callable[[Setting], Iterator[dict[str, Any]]] = getattr(import_module(module), name)
        return found(setting)


_HERE = "tests.bench.gpu"
SECTIONS = {
    "ceilings": Section(f"{_HERE}.ceilings:ceilings", 60),
    "suite": Section(f"{_HERE}.suite:suite", 420),
    "attention": Section(f"{_HERE}.attention:attention", 110),
    "tiles": Section(f"{_HERE}.tiles:tiles", 400),
    "nano": Section(f"{_HERE}.engines:nano", 75),
    "eight": Section(f"{_HERE}.engines:eight", 100),
    "shared": Section(f"{_HERE}.engines:shared", 60),
    "invariant": Section(f"{_HERE}.engines:invariant", 60),
    "quantised": Section(f"{_HERE}.quantised:quantised", 72),
    "experts": Section(f"{_HERE}.experts:experts", 72),
    "peer": Section(f"{_HERE}.peer:peer", 140),
}
DEFAULT = (
    "ceilings",
    "attention",
    "nano",
    "eight",
    "shared",
    "invariant",
    "peer",
)  # the others have to be named


def main() -> None:
    name, setting, path = sys.argv[1], Setting.of(sys.argv[2]), Path(sys.argv[3])
    status = 0
    found: dict[str, Any] = {}
    try:
        for found in SECTIONS[name].run(setting):
            path.write_text(json.dumps(found))
    except Exception as error:  # told in the result: the other sections go on
        traceback.print_exc()
        path.write_text(json.dumps({**found, "error": f"{type(error).__name__}: {error}"[:2000]}))
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # threads of others, transformers' among them, may not want to end


if __name__ == "__main__":
    main()
