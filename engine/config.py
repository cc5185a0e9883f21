"""How the engine is run (`EngineConfig`).

Owns the settings of one engine and their bounds. Knows neither the model's shape (`model_config`) nor the device's
memory. No torch: devices and dtypes are strings here, so that the worker can check them without loading it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine.model_config import StoredDType
from engine.sampling_params import InvalidParameter

Device = Literal["auto", "cpu", "cuda"]
DType = Literal["auto", StoredDType]
ModelImpl = Literal["auto", "nightpress", "transformers"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How one engine runs. Raises `InvalidParameter` for values that cannot work."""

    model: str  # a folder of safetensors, a GGUF file, or a hub id
    revision: str | None = None  # of a hub id
    device: Device = "auto"
    dtype: DType = "auto"  # auto: the checkpoint's own, bfloat16 for GGUF
    model_impl: ModelImpl = "auto"  # whose code computes it; auto: ours where it knows the architecture
    kernels: Literal["auto", "reference", "cpu", "triton"] = "auto"
    page_size: int | None = None  # KV slots per page, in tokens; None: 16 on cpu, 64 on cuda
    max_num_seqs: int = 256
    # the token budget of one step; None: 2048, on cuda 8192, and 16384 where it has 70 GiB
    max_num_batched_tokens: int | None = None
    max_model_len: int | None = None  # None: the model's own
    max_num_requests: int | None = None  # that may be in the engine process at once; None: 4 × max_num_seqs
    kv_cache_memory_bytes: int | None = None  # None: from what is free
    kv_cache_dtype: Literal["auto", "int8", "fp8"] = "auto"  # auto: the model's
    # int8: weights and activations of products are rounded to 8 bits
    quantization: Literal["int8"] | None = None
    enable_prefix_caching: bool = True
    # of decoding in one plan; None: 16 on cuda, 1 on cpu and where num_speculative_tokens are asked for
    num_scheduler_steps: int | None = None
    # guessed for each of a few sequences and checked in one step; 0: none; None: 7 on a CPU where that is cheap
    num_speculative_tokens: int | None = None
    scheduling_policy: Literal["planned", "fcfs"] = "planned"  # planned: by shared prefix and expected length
    preemption_mode: Literal["auto", "recompute", "swap"] = "auto"  # auto: what is faster
    swap_space_bytes: int | None = None  # host memory for pages; None: on cuda from what is free, on cpu 0
    # how a model marks what it thinks, told apart in the answers to chats; auto: as its tokenizer's marks say
    reasoning_parser: Literal["auto", "none", "think", "harmony"] = "auto"
    deterministic: bool | None = None  # None: where it costs next to nothing, which is on CPUs
    seed: int = 0  # for requests of `LLM` that bring none
    threads: int | None = None  # CPU threads; None: torch's own choice

    def __post_init__(self) -> None:
        if self.page_size is not None and (self.page_size < 16 or self.page_size % 16):
            raise InvalidParameter("page_size", "must be a positive multiple of 16")
        if self.max_num_seqs < 1:
            raise InvalidParameter("max_num_seqs", "must be at least 1")
        for name in (
            "max_num_batched_tokens",
            "num_scheduler_steps",
            "max_model_len",
            "max_num_requests",
            "kv_cache_memory_bytes",
            "threads",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidParameter(name, "must be at least 1, or left out")
        if self.num_speculative_tokens is not None and self.num_speculative_tokens < 0:
            raise InvalidParameter("num_speculative_tokens", "must be at least 0, or left out")
        if self.num_speculative_tokens and (self.num_scheduler_steps or 1) > 1:
            raise InvalidParameter("num_speculative_tokens", "must be 0 where num_scheduler_steps is above 1")
        if self.swap_space_bytes is not None and self.swap_space_bytes < 0:
            raise InvalidParameter("swap_space_bytes", "must be at least 0, or left out")
        if self.preemption_mode == "swap" and self.swap_space_bytes == 0:
            raise InvalidParameter("swap_space_bytes", "must be more than 0 where preemption_mode is swap")
