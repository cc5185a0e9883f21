"""Writes transformers' models as GGUF files by the rules of llama.cpp's converter.

Owns those rules as far as our families need them: names through the `gguf` package's map, the keys, the rows of q and
k that alternate in some families, Llama 3's divisors. Nothing here comes from `engine`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, get_tensor_name_map, quantize

INTERLEAVED = ("llama", "granite", "smollm3")

Change = Callable[[GGUFWriter], Any]


def interleaved(array: np.ndarray, heads: int) -> np.ndarray:
    """The two halves of every head's rows alternate."""
    shape = (heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return array.reshape(shape).swapaxes(1, 2).reshape(array.shape)


def write_gguf(
    path: Path, model: Any, architecture: str, *, quant: str = "F32", change: Change | None = None
) -> Path:
    """`model`: of transformers, in fp32. `quant`: of matrices whose rows have whole blocks. `change`: adds more."""
    config = model.config
    writer = GGUFWriter(path, architecture)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    if head_dim * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if architecture == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if rope["rope_type"] == "yarn":
        writer.add_string(f"{architecture}.rope.scaling.type", "yarn")
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", _divisors(model, head_dim))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "é", "<|end|>"])
    writer.add_token_types([1, 1, 3])
    writer.add_eos_token_id(2)
    writer.add_bos_token_id(1)
    (number,) = (key for key, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(number, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.float().numpy()
        if architecture in INTERLEAVED and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            array = interleaved(array, heads)
        kind = GGMLQuantizationType[quant if array.ndim == 2 and array.shape[1] % 32 == 0 else "F32"]
        own = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert own is not None, name
        writer.add_tensor(own, quantize(np.ascontiguousarray(array), kind), raw_dtype=kind)
    if change:
        change(writer)
    return finished(writer, path)


def finished(writer: GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _divisors(model: Any, head_dim: int) -> np.ndarray:
    plain = model.config.rope_parameters["rope_theta"] ** -(torch.arange(0, head_dim, 2) / head_dim)
    divisors: np.ndarray = (plain / model.model.rotary_emb.inv_freq).float().numpy()
    return divisors
