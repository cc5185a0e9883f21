"""Staging: arrays of a step's inputs on their way from the host to a device.

Owns that nobody waits for it. torch ends a copy from ordinary memory only when the GPU has done all that was asked of
it before: a step would stand still between its forward and its draws, once for every array. A copy from pinned memory
takes its place in the order of launches, and the host goes on. On a CPU nothing is copied. Knows no array's meaning.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def staged(array: NDArray[Any], device: torch.device | str) -> Tensor:
    """The array on the device, in the order of launches. On a CPU they share memory: the array is given away."""
    host = torch.from_numpy(array)
    device = torch.device(device)
    return host if device.type == "cpu" else _pinned(host).to(device, non_blocking=True)


def staged_ints(values: Sequence[int], device: torch.device | str) -> Tensor:
    """`[len(values)]` int64."""
    return staged(np.array(values, dtype=np.int64), device)


def put(array: NDArray[Any], target: Tensor) -> None:
    """Write the array over the target, whose shape it has."""
    host = torch.from_numpy(array)
    target.copy_(host if target.device.type == "cpu" else _pinned(host), non_blocking=True)


def _pinned(host: Tensor) -> Tensor:
    """Memory that torch gives to others only when the copy from it is done."""
    return host.pin_memory() if host.numel() else host
