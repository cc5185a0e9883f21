"""Shortage: which errors say that the device has no memory left, and how long what met one is not tried again.

Owns their words. torch's own allocator raises `torch.OutOfMemoryError`; what asks the driver past it (graphs, the
workspaces of cuBLAS and cuDNN, modules of kernels) fails with the driver's or the library's words in a RuntimeError.
The driver calls that error one after which a context goes on (`cudaErrorMemoryAllocation`); were it not so, the next
try would fail of something else. Who took the memory, another process perhaps, may give it back: hence pauses, and
each twice as long as the one before. Knows no plan and no page.
"""

from __future__ import annotations

from typing import Generic, TypeVar

import torch

PATIENCE = 256  # of a first pause
MOST_PATIENCE = 16 * PATIENCE

_WORDS = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")

T = TypeVar("T")


def is_shortage(error: RuntimeError) -> bool:
    """Whether a smaller piece of work may do, or the same one later."""
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in _WORDS)


class Pauses(Generic[T]):
    """Of things that met a shortage, in whatever passes."""

    def __init__(self) -> None:
        self._now = 0
        self._of: dict[T, tuple[int, int]] = {}  # when it is over, and how long it is

    def pass_one(self) -> None:
        self._now += 1

    def begin(self, name: T) -> None:
        _, before = self._of.get(name, (0, PATIENCE // 2))
        pause = min(2 * before, MOST_PATIENCE)
        self._of[name] = self._now + pause, pause

    def last(self, name: T) -> bool:
        """Whether it is not to be tried yet."""
        return name in self._of and self._now < self._of[name][0]
