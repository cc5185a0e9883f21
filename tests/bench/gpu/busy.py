"""Busy: which share of the time the device works, and on what.

Owns a profile of a few steps that only decode. Knows the engine's doors and no kernel of ours.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from engine.engine import Engine
from tests.bench.gpu.workloads import Workload

STEPS, TOP = 5, 12
SETTLING = 16  # steps beyond those that the prompts need, after which it is profiled anyway


def busy(engine: Engine, workload: Workload, *, on_gpu: bool, seconds: float) -> dict[str, Any]:
    """`gpu_busy`: the union of all intervals in which something ran on the device, over the wall time of the steps;
    `top`: kernels by time with their share of the sum of all. Without a GPU the operators of torch stand for kernels.

    The profiled steps begin when every sequence that runs has computed its prompt and no more come. The engine is
    empty afterwards."""
    end = time.perf_counter() + seconds
    for request in workload.requests():
        engine.add(request)
    settled, running = False, 0
    most = workload.num_prompt_tokens // engine.config.max_num_batched_tokens + SETTLING
    while engine.has_work and not settled and most and time.perf_counter() < end:
        engine.step()
        most -= 1
        sequences = engine.scheduler.running
        settled = running == len(sequences) and all(sequence.num_pending <= 1 for sequence in sequences)
        running = len(sequences)
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    num_steps = 0
    _synchronize(on_gpu)
    with profile(activities=[activity]) as profiled:
        start = time.perf_counter()
        while engine.has_work and num_steps < STEPS:
            engine.step()
            num_steps += 1
        _synchronize(on_gpu)
        wall = time.perf_counter() - start
    for request_id in engine.request_ids:
        engine.abort(request_id)

    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    events = [
        (event.name, event.time_range.start / 1e6, event.time_range.end / 1e6)
        for event in profiled.events() or ()
        if event.device_type == kind and not getattr(event, "is_user_annotation", False)
    ]
    times: dict[str, list[float]] = defaultdict(list)
    for name, first, last in events:
        times[name].append(last - first)
    total = sum(map(sum, times.values()))
    ranked = sorted(times.items(), key=lambda item: -sum(item[1]))[:TOP]
    return {
        "gpu_busy": round(union((first, last) for _, first, last in events) / wall, 3) if wall else None,
        "decoding_rows": running,
        "profiled_steps": num_steps,
        "ms_per_step": round(1e3 * wall / max(1, num_steps), 3),
        "launches_per_step": round(len(events) / max(1, num_steps), 1),
        "top": [
            {"kernel": name[:90], "share": round(sum(spent) / total, 4), "count": len(spent)}
            for name, spent in ranked
        ],
    }


def union(intervals: Iterable[tuple[float, float]]) -> float:
    """The length that intervals cover together."""
    covered, reached = 0.0, float("-inf")
    for first, last in sorted(intervals):
        if last > reached:
            covered += last - max(first, reached)
            reached = last
    return covered


def _synchronize(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.synchronize()
