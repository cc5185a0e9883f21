"""Engines: the sections that measure our engine on a workload.

Owns which engine each workload gets. Knows neither clocks nor bounds (`measurement`).
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from typing import Any

import torch

from engine.engine import Engine
from tests.bench.gpu import workloads
from tests.bench.gpu.measurement import measured, run_through
from tests.bench.gpu.setting import Setting
from tests.bench.gpu.shapes import random_engine
from tests.bench.gpu.workloads import CHUNK, Workload


def nano(setting: Setting) -> Iterator[dict[str, Any]]:
    yield from _alone(workloads.nano(setting).scaled(setting.share), setting)


def eight(setting: Setting) -> Iterator[dict[str, Any]]:
    memory = torch.cuda.get_device_properties(setting.device).total_memory if setting.on_gpu else 0
    yield from _alone(workloads.eight(setting, memory).scaled(setting.share), setting)


def shared(setting: Setting) -> Iterator[dict[str, Any]]:
    """With and without prefix caching; `ratio`: of their seconds."""
    workload = workloads.shared(setting).scaled(setting.share)
    end = time.perf_counter() + setting.seconds
    found: dict[str, Any] = {}
    for name, caching in (("cached", True), ("uncached", False)):
        engine = engine_for(workload, setting, enable_prefix_caching=caching)
        for part in measured(engine, workload, setting, end):
            found[name] = part
            yield found
        del engine
        free()
    found["ratio"] = round(found["uncached"]["seconds"] / found["cached"]["seconds"], 2)
    yield found


def invariant(setting: Setting) -> Iterator[dict[str, Any]]:
    """nano with half of its output, in deterministic mode and not, in turn twice; `cost`: the share of time that the
    mode takes more, of the faster runs."""
    workload = workloads.nano(setting).scaled(setting.share / 2)
    end = time.perf_counter() + setting.seconds
    found: dict[str, Any] = {}
    memory = {"kv_cache_memory_bytes": 2**35}  # of each; the workload takes three quarters of it
    engines = {
        name: engine_for(workload, setting, **memory, deterministic=name == "on") for name in ("off", "on")
    }
    for name, engine in engines.items():
        assert engine.runner.deterministic == (name == "on")
        run_through(engine, workload.warm_up(), end)
    seconds: dict[str, list[float]] = {"off": [], "on": []}
    for _ in range(2):
        for name, engine in engines.items():
            seconds[name].append(run_through(engine, workload, end))
            found = {"seconds": {key: [round(one, 3) for one in each] for key, each in seconds.items()}}
            yield found
    found["cost"] = round(min(seconds["on"]) / min(seconds["off"]) - 1, 3)
    yield found


def _alone(workload: Workload, setting: Setting) -> Iterator[dict[str, Any]]:
    end = time.perf_counter() + setting.seconds
    start = time.perf_counter()
    engine = engine_for(workload, setting)
    loaded = round(time.perf_counter() - start, 2)
    for found in measured(engine, workload, setting, end):
        yield {"load_seconds": loaded, **found}


def engine_for(workload: Workload, setting: Setting, **more: Any) -> Engine:
    """`more`: of `random_engine`."""
    if setting.tiny:
        more |= {"kv_cache_memory_bytes": 2**23}
    return random_engine(
        workload.model,
        setting,
        max_model_len=256 if setting.tiny else workload.max_model_len,
        max_num_batched_tokens=128 if setting.tiny else CHUNK,
        **more,
    )


def free() -> None:
    """Give the device its memory back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
