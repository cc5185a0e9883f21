"""Peer: transformers' own continuous batching on the same requests, beside ours.

Owns how that is called, and its time limit. Both get the same prompts, lengths and temperature, and random weights of
the same shape; each is warmed up once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch

from tests.bench.gpu import workloads
from tests.bench.gpu.engines import engine_for, free
from tests.bench.gpu.measurement import run_through
from tests.bench.gpu.setting import Setting
from tests.bench.gpu.shapes import shape
from tests.bench.gpu.workloads import Workload

REQUESTS, LIMIT_SECONDS = 64, 90.0


def peer(setting: Setting) -> Iterator[dict[str, Any]]:
    """`ours` and `theirs`: output tokens per second and seconds; `cut` where the time limit came first."""
    end = time.perf_counter() + setting.seconds
    workload = workloads.nano(setting).scaled(setting.share).first(6 if setting.tiny else REQUESTS)
    engine = engine_for(workload, setting)
    run_through(engine, workload.warm_up(), end)
    found: dict[str, Any] = {"requests": len(workload.prompts), "output_tokens": workload.num_new_tokens}
    before = engine.stats()["num_generated_tokens"]
    seconds = run_through(engine, workload, end)
    found["ours"] = _rate(int(engine.stats()["num_generated_tokens"] - before), seconds)
    if time.perf_counter() >= end:
        found["ours"]["cut"] = True
    yield found
    del engine
    free()
    found["theirs"] = _theirs(workload, setting, end)
    if not found["ours"].get("cut") and not found["theirs"].get("cut"):
        found["ratio"] = round(found["ours"]["output_tok_s"] / found["theirs"]["output_tok_s"], 2)
    yield found


def _theirs(workload: Workload, setting: Setting, end: float) -> dict[str, Any]:
    import transformers
    from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
    from transformers.generation.continuous_batching.utils import WorkloadHints

    config = transformers.Qwen3Config(**shape(workload.model, tiny=setting.tiny))
    with torch.device(setting.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    generation = GenerationConfig(
        do_sample=True,
        temperature=workload.temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max(workload.new_tokens),
        eos_token_id=-1,
        pad_token_id=0,
    )
    small = {"num_blocks": 64, "max_batch_tokens": 256} if setting.tiny else {}
    hints = WorkloadHints(
        max_prompt_length=max(map(len, workload.prompts)),
        max_generated_length=max(workload.new_tokens),
        num_requests=len(workload.prompts),
    )
    model.requires_grad_(False)
    with torch.no_grad():  # as in `generate_batch`; in inference mode 5.17 fails
        manager = model.init_continuous_batching(
            generation_config=generation,
            continuous_batching_config=ContinuousBatchingConfig(**small),
            workload_hints=hints,
        )
        start = time.perf_counter()
        manager.warmup()
        manager.start()
    _answered(manager, workload.warm_up(4), end)
    warm_up_seconds = time.perf_counter() - start
    end = min(end, time.perf_counter() + LIMIT_SECONDS)
    start = time.perf_counter()
    made = _answered(manager, workload, end)
    seconds = time.perf_counter() - start
    cut = made < workload.num_new_tokens
    manager.stop(block=True, timeout=5, hard_stop=cut)
    return {
        **_rate(made, seconds),
        "warm_up_seconds": round(warm_up_seconds, 2),
        "attention": model.config._attn_implementation,
        **({"cut": True, "output_tokens": made} if cut else {}),
    }


def _answered(manager: Any, workload: Workload, end: float) -> int:
    """Tokens of requests that ended before `end`: of a run that is cut, fewer than were made. Raises `RuntimeError`
    for a request that failed."""
    for k, (prompt, count) in enumerate(zip(workload.prompts, workload.new_tokens, strict=True)):
        manager.add_request(prompt, request_id=f"{workload.name}-{k}", max_new_tokens=count, eos_token_id=-1)
    made, left = 0, len(workload.prompts)
    while left and time.perf_counter() < end:
        result = manager.get_result(timeout=0.5)
        if result is None:
            if not manager.is_running():
                raise RuntimeError("transformers' generation thread has ended")
            continue
        if result.error is not None:
            raise RuntimeError(f"transformers failed: {result.error}")
        if result.is_finished():
            made, left = made + len(result.generated_tokens), left - 1
    return made


def _rate(tokens: int, seconds: float) -> dict[str, Any]:
    return {"output_tok_s": round(tokens / seconds, 1), "seconds": round(seconds, 2)}
