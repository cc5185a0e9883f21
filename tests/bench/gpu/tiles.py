"""Tiles: how long attention takes with other tiles than the table's, which is how `kernels.gpu.tiles` is found.

Owns the candidates. Nobody chooses among them by itself: the times of an architecture are read by whoever writes its
line of the table. Every candidate is compiled, so this takes minutes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from typing import Any

import torch
import triton

from kernels import Attention, kernels_for
from kernels.gpu import launch
from kernels.gpu.architectures import capability
from kernels.gpu.tiles import Tiles, tiles_for
from tests.bench.gpu.attention import Case, make_inputs
from tests.bench.gpu.setting import Setting
from tests.bench.gpu.timing import seconds_of

PAGE = 64
CASES = (
    Case("prefill 16 x 1k, 32/8/128", 16, 1024, 1024, 32, 8, 128),
    Case("decode 256 x 1k, 32/8/128", 256, 1, 1024, 32, 8, 128),
    Case("prefill 4 x 4k, 32/8/128, window 1k", 4, 4096, 4096, 32, 8, 128, window=1024),
    Case("prefill 16 x 1k, 32/8/128, int8", 16, 1024, 1024, 32, 8, 128, storage=torch.int8),
    Case("decode 256 x 1k, 32/8/128, int8", 256, 1, 1024, 32, 8, 128, storage=torch.int8),
    Case("prefill 16 x 1k, 18/6/64", 16, 1024, 1024, 18, 6, 64),
    Case("prefill 16 x 1k, 8/4/256", 16, 1024, 1024, 8, 4, 256),
)
TINY = (
    Case("prefill 1 x 64, 2/1/16", 1, 64, 64, 2, 1, 16),
    Case("decode 2 x 64, 2/1/16", 2, 1, 64, 2, 1, 16),
)


def tiles(setting: Setting) -> Iterator[dict[str, Any]]:
    """For each case, microseconds by candidate, the table's own first; None where one does not fit the device."""
    end = time.perf_counter() + setting.seconds
    found: dict[str, Any] = {"cases": []}
    kernels = kernels_for(setting.device, "triton")
    for case in TINY if setting.tiny else CASES:
        q, cache, table, starts, lens, *_ = make_inputs(case, setting.device, PAGE, keys_by_token=True)
        width = triton.next_power_of_2(case.dim)
        own = tiles_for(capability(q.device), width, fp32=False, scaled=case.storage is not None)
        result: dict[str, Any] = {"case": case.name, "own": label(case, own), "us": {}}
        found["cases"].append(result)
        # as the engine asks: steps of decoding alone have no starts
        asked = None if case.queries == 1 else starts
        how = Attention(case.dim**-0.5, window=case.window)
        for candidate in candidates(case, own, setting):
            if time.perf_counter() > end:
                found["cut"] = True
                yield found
                return
            with chosen(candidate):
                try:
                    seconds = seconds_of(
                        lambda args=(q, cache, table, asked, lens, how): kernels.paged_attention(*args),
                        setting.device,
                    )
                except triton.runtime.errors.OutOfResources:
                    seconds = None
            result["us"][label(case, candidate)] = None if seconds is None else round(seconds * 1e6, 1)
            yield found


def candidates(case: Case, own: Tiles, setting: Setting) -> Iterator[Tiles]:
    """The table's own, then others that differ in what the case depends on."""
    yield own
    if setting.tiny:
        others = [replace(own, tokens=32, decode_stages=3)]
    elif case.queries == 1:
        others = [
            replace(own, tokens=tokens, decode_warps=warps, decode_stages=stages)
            for tokens, warps, stages in product((32, 64, 128), (2, 4, 8), (2, 3, 4))
        ]
    else:
        others = [
            replace(own, rows=rows, tokens=tokens, warps=warps, stages=stages)
            for rows, tokens, warps, stages in product((64, 128), (32, 64), (4, 8), (2, 3))
            if rows == 64 or warps == 8
        ]
    yield from (other for other in others if other != own)


def label(case: Case, one: Tiles) -> str:
    """Of what the case depends on: rows · tokens of a tile, warps, stages."""
    if case.queries == 1:
        return f"{one.tokens} tokens, {one.decode_warps} warps, {one.decode_stages} stages"
    return f"{one.rows} x {one.tokens}, {one.warps} warps, {one.stages} stages"


@contextmanager
def chosen(one: Tiles) -> Iterator[None]:
    """Attention is launched with these tiles."""
    before = launch.tiles_for
    launch.tiles_for = lambda *_, **__: one  # type: ignore[assignment]
    try:
        yield
    finally:
        launch.tiles_for = before
