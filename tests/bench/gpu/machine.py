"""Machine: on what something was measured.

Owns the names and versions that make a figure worth keeping. What is not known is None.
"""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch


def machine(device: str) -> dict[str, Any]:
    on_gpu = device != "cpu"
    found = torch.cuda.get_device_properties(device) if on_gpu else None
    return {
        "device": found.name if found else platform.processor() or "cpu",
        "memory_gib": round(found.total_memory / 2**30, 1) if found else None,
        "capability": list(torch.cuda.get_device_capability(device)) if on_gpu else None,
        "multiprocessors": found.multi_processor_count if found else None,
        "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if on_gpu
        else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "commit": _said("git", "rev-parse", "--short", "HEAD"),
        "changed": bool(_said("git", "status", "--porcelain", "--untracked-files=no")),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _said(*command: str) -> str | None:
    """The first line that a command prints."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (done.stdout.splitlines() or [None])[0] if done.returncode == 0 else None
