"""Which GPU a device is, and after which one's figures tiles are chosen for it."""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch

Architecture = Literal["sm_80", "sm_90", "sm_100"]


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Of a GPU, as torch says it. In the interpreter, on a CPU, that of sm_90."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def architecture(capability: tuple[int, int]) -> Architecture:
    """The newest for which there are tiles that is not newer than the device."""
    return "sm_100" if capability[0] >= 10 else "sm_90" if capability[0] == 9 else "sm_80"
