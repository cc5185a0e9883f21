"""OpenVINO GenAI's `ContinuousBatchingPipeline` on a workload file, with prefix caching and 2,048 tokens a step.

The precision of its KV cache is its own choice (8 bits by default).
"""

from __future__ import annotations

import numpy as np
import openvino  # type: ignore[import-not-found]
import openvino.opset13 as ops  # type: ignore[import-not-found]
import openvino_genai  # type: ignore[import-not-found]
from child import Loaded, Order, main

HINTS = {"bfloat16": "bf16", "float32": "f32"}


def load(order: Order) -> Loaded:
    hint = {"INFERENCE_PRECISION_HINT": HINTS[order.dtype]}
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.enable_prefix_caching = True
    scheduler.max_num_batched_tokens = 2048
    scheduler.cache_size = 4  # GiB
    pipeline = openvino_genai.ContinuousBatchingPipeline(order.model, scheduler, "CPU", hint)

    def config(count: int) -> openvino_genai.GenerationConfig:
        made = openvino_genai.GenerationConfig()
        made.max_new_tokens = made.min_new_tokens = count
        made.ignore_eos, made.do_sample = True, False
        return made

    def generate(prompts: list[list[int]], new_tokens: list[int]) -> list[int]:
        ids = [openvino.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
        answers = pipeline.generate(ids, [config(count) for count in new_tokens])
        return [len(answer.m_generation_ids[0]) for answer in answers]

    return Loaded(generate, computed_in(hint))


def computed_in(hint: dict[str, str]) -> str:
    """What the device makes of the hint: a CPU without such instructions may take another type."""
    x = ops.parameter([4, 64], np.float32)
    product = ops.matmul(x, ops.constant(np.ones((64, 64), np.float32)), transpose_a=False, transpose_b=True)
    compiled = openvino.compile_model(openvino.Model([product], [x]), "CPU", hint)
    return str(compiled.get_property("INFERENCE_PRECISION_HINT").to_string())


if __name__ == "__main__":
    main(load, ("openvino-genai", "openvino"))
