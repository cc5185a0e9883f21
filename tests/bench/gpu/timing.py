"""Timing: how long a call takes on its device.

Owns warm-up, repeats and the median. Calls on a GPU are captured as a graph where that works and its replays are
timed by events, so that the host's launches are not counted; between two of them the L2 cache is overwritten.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

REPEATS, WARM_UPS = 10, 3
_FLUSHED_BYTES = 2**28  # more than any L2 cache holds


def seconds_of(
    call: Callable[[], object], device: str, *, graphed: bool = True, warm_ups: int = WARM_UPS
) -> float:
    """Median of `REPEATS` after the warm-ups. A call that cannot be captured is timed as it is."""
    for _ in range(warm_ups):
        call()
    if device == "cpu":
        return statistics.median(_host_seconds(call) for _ in range(REPEATS))
    torch.cuda.synchronize()
    replay = _captured(call) if graphed else None
    return _device_seconds(replay or call)


def _host_seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _captured(call: Callable[[], object]) -> Callable[[], object] | None:
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
        graph.replay()
        torch.cuda.synchronize()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


def _device_seconds(call: Callable[[], object]) -> float:
    flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.int8, device="cuda")
    pairs = [(_event(), _event()) for _ in range(REPEATS)]
    for start, end in pairs:
        flushed.zero_()  # also keeps the device busy while the host queues the call
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)
