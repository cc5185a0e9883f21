"""Measurement: one workload on one engine: rates, the share of what the device could do, what it was busy with.

Owns the loop of steps and its clock. Knows neither what the requests are (`workloads`) nor how a bound is counted.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch

from engine.engine import Engine
from tests.bench.gpu.busy import busy
from tests.bench.gpu.recorder import Recorder
from tests.bench.gpu.roofline import Roofline, ideal_steps
from tests.bench.gpu.setting import Setting
from tests.bench.gpu.workloads import Workload

BUSY_SECONDS = 20.0  # a profile may take so long to get going


def measured(engine: Engine, workload: Workload, setting: Setting, end: float) -> Iterator[dict[str, Any]]:
    """What was found so far: rates, then bounds, then the profile. `end`: of `time.perf_counter`, when to stop:
    what is not done then is cut. One warm-up comes first."""
    start = time.perf_counter()
    run_through(engine, workload.warm_up(), end)
    found: dict[str, Any] = {"warm_up_seconds": round(time.perf_counter() - start, 2)}
    before = engine.stats()
    with Recorder(engine) as recorder:
        seconds = run_through(engine, workload, end)
    cut = time.perf_counter() >= end
    after = engine.stats()

    def made(name: str) -> int:
        return int(after[name] - before[name])

    output = made("num_generated_tokens")
    found |= {
        "requests": len(workload.prompts),
        "prompt_tokens": workload.num_prompt_tokens,
        "output_tokens": output,
        "seconds": round(seconds, 3),
        "output_tok_s": round(output / seconds, 1),
        "total_tok_s": None if cut else round((workload.num_prompt_tokens + output) / seconds, 1),
        "steps": recorder.num_steps,
        "recorder_seconds": round(recorder.seconds, 3),
        "cached_tokens": made("num_cached_tokens"),
        "recomputed_tokens": made("num_recomputed_tokens"),
        "preemptions": made("num_preemptions"),
        "pages": engine.pool.num_pages,
    }
    if cut:
        found["cut"] = True
    yield found
    assert cut or output == workload.num_new_tokens, "a request did not get the tokens it asked for"
    roofline = Roofline(engine.runner.model_config, *setting.rates)
    bound = roofline.seconds(recorder.steps())
    ideal = roofline.seconds(
        ideal_steps(
            [len(prompt) for prompt in workload.prompts],
            workload.new_tokens,
            engine.config.max_num_batched_tokens,
            workload.shared if engine.config.enable_prefix_caching else 0,
        )
    )
    found |= {
        "roofline_seconds": round(bound, 4),
        "roofline_share": round(bound / seconds, 4),
        "ideal_seconds": round(ideal, 4),
        "ideal_share": None if cut else round(ideal / seconds, 4),
    }
    yield found
    allowed = min(BUSY_SECONDS, end - time.perf_counter())
    if allowed > 0:
        found |= busy(engine, workload, on_gpu=setting.on_gpu, seconds=allowed)
        yield found


def run_through(engine: Engine, workload: Workload, end: float) -> float:
    """Seconds until all requests are answered, or until `end`; what is left is aborted."""
    _synchronize(engine)
    start = time.perf_counter()
    for request in workload.requests():
        engine.add(request)
    while engine.has_work and time.perf_counter() < end:
        for completion in engine.step():
            assert completion.error is None, completion.error
    _synchronize(engine)
    seconds = time.perf_counter() - start
    for request_id in engine.request_ids:
        engine.abort(request_id)
    return seconds


def _synchronize(engine: Engine) -> None:
    if torch.device(engine.runner.device).type == "cuda":
        torch.cuda.synchronize()
