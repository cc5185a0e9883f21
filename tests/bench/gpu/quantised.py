"""Quantised: the section that measures an 8B model's decoding with weights of 16, 8 and 4 bits.

Owns what is kept of such a model and two workloads, of few rows and of many. Weights are random. Shares are of a
roofline that counts the bytes of the weights as they are kept, and products at the rate of bfloat16.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch

from engine.config_json import model_config
from engine.kept_weights import Float8Format, Int4Format, WeightFormat
from engine.parameters import parameter_shapes
from kernels.weights import Int4Weight
from tests.bench.gpu.engines import engine_for, free
from tests.bench.gpu.measurement import run_through
from tests.bench.gpu.recorder import Recorder
from tests.bench.gpu.roofline import Roofline
from tests.bench.gpu.setting import Setting
from tests.bench.gpu.shapes import QWEN3_8B, shape
from tests.bench.gpu.workloads import decoding

FORMATS: dict[str, WeightFormat | None] = {
    "bf16": None,
    "int4": Int4Format(128, torch.float16, ordered=False),
    "fp8": Float8Format(blocks=False),
    "fp8_blocks": Float8Format(blocks=True),
}


def quantised(setting: Setting) -> Iterator[dict[str, Any]]:
    """By format and rows: `output_tok_s`, `roofline_share`, `weight_bytes` of the layers."""
    end = time.perf_counter() + setting.seconds
    found: dict[str, Any] = {}
    for name, how in FORMATS.items():
        if time.perf_counter() > end - setting.seconds / 8:
            found["cut"] = True
            break
        kept = kept_of(setting, how)
        few, many = (
            decoding(QWEN3_8B, rows, 128, setting) for rows in ((2, 4) if setting.tiny else (16, 256))
        )
        engine = engine_for(many, setting, kept=kept, max_num_seqs=len(many.prompts))
        found[name] = {"weight_bytes": weight_bytes(setting, kept)}
        for rows, workload in (("few", few), ("many", many)):
            run_through(engine, workload.warm_up(len(workload.prompts)), end)
            with Recorder(engine) as recorder:
                seconds = run_through(engine, workload, end)
            roofline = Roofline(
                engine.runner.model_config, *setting.rates, layer_bytes=found[name]["weight_bytes"]
            )
            found[name][rows] = {
                "rows": len(workload.prompts),
                "output_tok_s": round(workload.num_new_tokens / seconds, 1),
                "roofline_share": round(roofline.seconds(recorder.steps()) / seconds, 4),
            }
            if time.perf_counter() >= end:
                found["cut"] = True
                return
            yield found
        del engine
        free()
    yield found


def kept_of(setting: Setting, how: WeightFormat | None) -> dict[str, WeightFormat]:
    """All products of the layers that fit, and not the head, as quantisers leave it."""
    if how is None:
        return {}
    shapes = parameter_shapes(model_config(shape(QWEN3_8B, tiny=setting.tiny)))
    return {
        name: how
        for name, sizes in shapes.items()
        if len(sizes) == 2
        and ".layers." in name
        and (isinstance(how, Float8Format) or Int4Weight.fits(sizes[1], how.group_size))
    }


def weight_bytes(setting: Setting, kept: dict[str, WeightFormat]) -> int:
    """Of all parameters but the embedding and the head."""
    total = 0
    for name, sizes in parameter_shapes(model_config(shape(QWEN3_8B, tiny=setting.tiny))).items():
        if name in kept:
            total += kept[name].empty(sizes, "meta").num_bytes
        elif not name.startswith(("model.embed_", "lm_head.")):
            total += 2 * torch.empty(sizes, device="meta").numel()
    return total
