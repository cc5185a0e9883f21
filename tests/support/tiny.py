"""Tiny random Llama checkpoints, in the very files transformers reads, made in milliseconds without torch.

Owns the folder: config.json, generation_config.json, safetensors (one file or several with an index),
tokenizer.json and tokenizer_config.json with a chat template. Weights are drawn from a seed with a spread
large enough that attention is peaked and greedy tokens vary, so that a wrong kernel shows.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 320
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2
EOS_TOKEN_ID = 2
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SIZES: Mapping[str, Any] = {  # of tiny models that transformers makes, in its own words
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_TEXT = (
    "the quick brown fox jumps over the lazy dog while the night press prints every page by morning "
    "and all the jobs that wait in the queue are done before the sun comes up over the sleeping town"
)


def write_tiny_llama(
    folder: Path | str,
    *,
    seed: int = 0,
    vocab_size: int = VOCAB_SIZE,
    hidden_size: int = 64,
    intermediate_size: int = 96,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int | None = None,
    max_position: int = 512,
    tied: bool = False,
    attention_bias: bool = False,
    mlp_bias: bool = False,
    rope_parameters: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    num_shards: int = 1,
    eos_token_id: int | list[int] = EOS_TOKEN_ID,
    nan_token_id: int | None = None,
) -> Path:
    """Write one checkpoint and return its folder. `nan_token_id`: this token's embedding row is NaN (use with
    `tied=False`, or its logit is NaN for everyone). `dtype`: float32 or bfloat16, as stored."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    head_dim = head_dim or hidden_size // num_heads
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}

    def matrix(name: str, rows: int, columns: int, bias: bool = False) -> None:
        spread = 1.5 / np.sqrt(columns)
        tensors[f"{name}.weight"] = rng.normal(0, spread, (rows, columns)).astype(np.float32)
        if bias:
            tensors[f"{name}.bias"] = rng.normal(0, 0.2, rows).astype(np.float32)

    def norm(name: str) -> None:
        tensors[f"{name}.weight"] = (1 + rng.normal(0, 0.1, hidden_size)).astype(np.float32)

    tensors["model.embed_tokens.weight"] = rng.normal(0, 1, (vocab_size, hidden_size)).astype(np.float32)
    if nan_token_id is not None:
        tensors["model.embed_tokens.weight"][nan_token_id] = np.nan
    for i in range(num_layers):
        layer = f"model.layers.{i}"
        norm(f"{layer}.input_layernorm")
        matrix(f"{layer}.self_attn.q_proj", num_heads * head_dim, hidden_size, attention_bias)
        matrix(f"{layer}.self_attn.k_proj", num_kv_heads * head_dim, hidden_size, attention_bias)
        matrix(f"{layer}.self_attn.v_proj", num_kv_heads * head_dim, hidden_size, attention_bias)
        matrix(f"{layer}.self_attn.o_proj", hidden_size, num_heads * head_dim, attention_bias)
        norm(f"{layer}.post_attention_layernorm")
        matrix(f"{layer}.mlp.gate_proj", intermediate_size, hidden_size, mlp_bias)
        matrix(f"{layer}.mlp.up_proj", intermediate_size, hidden_size, mlp_bias)
        matrix(f"{layer}.mlp.down_proj", hidden_size, intermediate_size, mlp_bias)
    norm("model.norm")
    if not tied:
        matrix("lm_head", vocab_size, hidden_size)
    _write_weights(folder, tensors, dtype, num_shards)

    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": max_position,
        "rms_norm_eps": 1e-5,
        "rope_parameters": dict(rope_parameters or {"rope_type": "default", "rope_theta": 10000.0}),
        "tie_word_embeddings": tied,
        "attention_bias": attention_bias,
        "mlp_bias": mlp_bias,
        "bos_token_id": 0,
        "eos_token_id": eos_token_id,
        "dtype": dtype,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    generation = {"bos_token_id": 0, "eos_token_id": eos_token_id, "_from_model_config": True}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=1))
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE of `VOCAB_SIZE` tokens: 3 special, 256 bytes, 61 merges learned from one sentence."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        show_progress=False,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[0],
        "eos_token": SPECIAL_TOKENS[2],
        "pad_token": SPECIAL_TOKENS[0],
        "add_bos_token": False,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


def _write_weights(folder: Path, tensors: dict[str, np.ndarray], dtype: str, num_shards: int) -> None:
    names = sorted(tensors)
    if num_shards == 1:
        _write_file(folder / "model.safetensors", tensors, names, dtype)
        return
    weight_map: dict[str, str] = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        _write_file(folder / file, tensors, names[shard::num_shards], dtype)
        weight_map |= dict.fromkeys(names[shard::num_shards], file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _write_file(path: Path, tensors: dict[str, np.ndarray], names: list[str], dtype: str) -> None:
    """The safetensors format: header length (8 bytes), JSON header of dtypes, shapes, offsets, then data."""
    code = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    blobs: list[bytes] = []
    offset = 0
    for name in names:
        blobs.append(_stored(tensors[name], dtype))
        end = offset + len(blobs[-1])
        header[name] = {"dtype": code, "shape": list(tensors[name].shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))


def _stored(array: np.ndarray, dtype: str) -> bytes:
    if dtype == "float32":
        return array.tobytes()
    if dtype == "float16":
        return array.astype(np.float16).tobytes()
    bits = array.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to nearest even
    return np.where(np.isnan(array), np.uint64(0x7FC0), rounded).astype(np.uint16).tobytes()
