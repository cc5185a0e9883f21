"""Experts: the section that measures a mixture of experts, all of a layer in one operation and one by one.

Owns the workloads, of few rows and of many, and the rate at which the weights would be read if each step read all of
them once: of many rows nearly every expert has some. Twelve of the model's layers, so that two of them load in time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from engine.config_json import model_config
from engine.parameters import parameter_shapes
from tests.bench.gpu.engines import engine_for, free
from tests.bench.gpu.measurement import run_through
from tests.bench.gpu.setting import Setting
from tests.bench.gpu.shapes import QWEN3_30B_A3B, shape
from tests.bench.gpu.workloads import decoding

WAYS = {"mixed": True, "one_by_one": False}


def experts(setting: Setting) -> Iterator[dict[str, Any]]:
    """By way and rows: `output_tok_s`, `copy_share` (of the copy rate, were all weights read once a step)."""
    end = time.perf_counter() + setting.seconds
    found: dict[str, Any] = {}
    for way, mixes in WAYS.items():
        few, many = (
            decoding(QWEN3_30B_A3B, rows, 64, setting) for rows in ((2, 4) if setting.tiny else (16, 256))
        )
        engine = engine_for(many, setting, mixes_experts=mixes, max_num_seqs=len(many.prompts))
        found[way] = {}
        for rows, workload in (("few", few), ("many", many)):
            run_through(engine, workload.warm_up(len(workload.prompts)), end)
            seconds = run_through(engine, workload, end)
            read = _weight_bytes(setting) * workload.new_tokens[0]
            found[way][rows] = {
                "rows": len(workload.prompts),
                "output_tok_s": round(workload.num_new_tokens / seconds, 1),
                "copy_share": round(read / setting.rates[0] / seconds, 4),
            }
            if time.perf_counter() >= end:
                found["cut"] = True
                yield found
                return
            yield found
        del engine
        free()
    found["ratio"] = round(
        found["mixed"]["many"]["output_tok_s"] / found["one_by_one"]["many"]["output_tok_s"], 2
    )
    yield found


def _weight_bytes(setting: Setting) -> int:
    """Of the products of all layers, experts and all, and of the head."""
    shapes = parameter_shapes(model_config(shape(QWEN3_30B_A3B, tiny=setting.tiny)))
    return sum(
        2 * sizes[0] * sizes[1] for name, sizes in shapes.items() if len(sizes) == 2 and "embed" not in name
    )
