"""Machine: what an engine would compute with here. `python -m engine.machine DEVICE KERNELS` says it as JSON.

Owns no choice: device and kernels are those that loading a model would take, and what has to be compiled for them is.
A program of its own, because whoever asks (`nightpress doctor`) never loads torch.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import Any, cast

import torch

from engine.memory import free_memory_bytes
from engine.resolved_settings import resolve_device
from kernels import KernelSet, kernels_for


def machine(device: str, kernels: KernelSet) -> dict[str, Any]:
    """`device`, its `name`, `free_bytes` of its memory, `kernels`, and torch's version. Raises `ValueError` where the
    device or the kernels are not to be had."""
    resolved = resolve_device(device)
    name = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    return {
        "device": resolved,
        "name": torch.cuda.get_device_name() if resolved == "cuda" else name,
        "free_bytes": free_memory_bytes(resolved),
        "kernels": kernels_for(resolved, kernels).name,
        "torch": torch.__version__,
    }


def main() -> None:
    """One line of JSON on standard output: the facts, or `error`. Warnings go to standard error."""
    logging.basicConfig(format="%(message)s")
    device, kernels = sys.argv[1:]
    try:
        found = machine(device, cast(KernelSet, kernels))
    except ValueError as error:
        found = {"error": str(error)}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
