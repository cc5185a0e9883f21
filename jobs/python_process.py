"""A module of ours as another Python process: the command that starts it, and what it inherits.

Owns how such a process finds our packages and nothing else: wherever it is started, it takes them from where they lie
here, and never from a folder of the same name where the user happens to be. Pipes and signals are the caller's.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType


def command_of(module: str, *arguments: str) -> list[str]:
    """-P: the current folder is not looked into."""
    return [sys.executable, "-P", "-m", module, *arguments]


def environment_of(defaults: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """Our own environment with our packages in front; `defaults` where it says nothing."""
    roots = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return {**defaults, **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, roots))}
