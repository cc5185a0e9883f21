"""Ceilings: what the device can do at most, measured: bytes copied and products computed per second.

Owns the two measurements that every bound here is made of. Knows no model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from tests.bench.gpu.machine import machine
from tests.bench.gpu.setting import Setting
from tests.bench.gpu.timing import seconds_of


def ceilings(setting: Setting) -> Iterator[dict[str, Any]]:
    """`copy_gb_s`: bytes read and written by a copy within the device. `product_tflop_s`: of bfloat16 matrices of
    random numbers."""
    with torch.inference_mode():
        num_bytes = 2**24 if setting.tiny else 2**32
        copied = _copied(num_bytes, setting.device)
        size = 256 if setting.tiny else 8192
        computed = _computed(size, setting.device)
    yield {
        "copy_gb_s": float(f"{copied / 1e9:.5g}"),
        "copy_bytes": num_bytes,
        "product_tflop_s": float(f"{computed / 1e12:.5g}"),
        "product_size": size,
        "machine": machine(setting.device),
    }


def _copied(num_bytes: int, device: str) -> float:
    """Bytes read and written per second."""
    source = torch.randint(0, 127, (num_bytes,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / seconds_of(lambda: target.copy_(source), device, graphed=False)


def _computed(size: int, device: str) -> float:
    """Operations per second."""
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    warm_ups = 30  # the clock of an idle device has to rise
    return 2 * size**3 / seconds_of(lambda: torch.mm(a, b, out=out), device, graphed=False, warm_ups=warm_ups)
