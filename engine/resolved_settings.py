"""Resolved settings: what an engine's settings mean for this model, on this device, with these kernels.

Owns what `auto` and what is left out become, and the refusals of what cannot be had here, each by the setting's name.
Knows neither weights nor how much memory there is (`memory`).
"""

from __future__ import annotations

import torch

from engine.cache import EIGHT_BITS
from engine.config import EngineConfig
from engine.model_config import ModelConfig
from engine.sampling_params import InvalidParameter
from kernels import Kernels


def resolve_max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    """What is wanted, or all that the model allows. Raises `InvalidParameter`."""
    max_model_len = config.max_model_len or model.max_position
    if max_model_len > model.max_position:
        raise InvalidParameter("max_model_len", f"the model allows at most {model.max_position}")
    return max_model_len


def resolve_device(device: str) -> str:
    """`auto` is the GPU where torch sees one."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise InvalidParameter("device", "torch sees no CUDA device here; use cpu or auto")
    return device


def resolve_dtype(dtype: str, model: ModelConfig, device: str) -> torch.dtype:
    """`auto` is what the checkpoint stores, except that a CPU computes float16 checkpoints in bfloat16."""
    on_cpu = torch.device(device).type == "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if model.dtype == "float16" and on_cpu else model.dtype
    if dtype == "float16" and on_cpu:
        raise InvalidParameter("dtype", "float16 needs a GPU; on cpu use bfloat16 or float32")
    return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[dtype]


def resolve_kv_cache_dtype(name: str, dtype: torch.dtype, kernels: Kernels) -> torch.dtype:
    """What the pages store: `auto` is the dtype of the activations. Raises `InvalidParameter`."""
    storage = dtype if name == "auto" else EIGHT_BITS[name]
    if storage != dtype and storage not in kernels.quantised:
        allowed = ["auto", *(known for known, kind in EIGHT_BITS.items() if kind in kernels.quantised)]
        raise InvalidParameter(
            "kv_cache_dtype",
            f"the {kernels.name} kernels have no {name} cache; allowed here: {', '.join(allowed)}",
        )
    return storage


def refuse_quantization(name: str | None, model: ModelConfig, kernels: Kernels) -> None:
    """Raises `InvalidParameter` where products cannot be rounded so."""
    if name is None:
        return
    if kernels.int8_matmul is None:
        raise InvalidParameter(
            "quantization", f"the {kernels.name} kernels have no int8 products; leave it out"
        )
    if model.definition == "transformers":
        raise InvalidParameter("quantization", "transformers' own code computes this model; leave it out")
