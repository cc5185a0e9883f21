"""GGUFFile: the metadata and tensors of a llama.cpp checkpoint, under Hugging Face names.

Owns the GGUF container (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) and the way back from
llama.cpp's conventions: tensor names, the row permutation of q and k, rope factors. Knows no torch. The
header is parsed here rather than by the `gguf` package, whose reader needs two seconds for the vocabulary
alone; that package is imported only to dequantise.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.config import ModelConfig, RopeScaling
from engine.families import UnsupportedCheckpoint, checked

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_F32 = 0

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_ROPE_FACTORS = "rope_freqs.weight"


class TensorInfo(NamedTuple):
    shape: tuple[int, ...]  # in numpy's order: rows first
    type_id: int  # GGMLQuantizationType
    offset: int  # of the first byte, from the start of the file


@dataclass(frozen=True, slots=True)
class GGUFFile:
    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    @classmethod
    def open(cls, path: Path) -> GGUFFile:
        """Parse the header (about 0.1 s for 50,000 tokens). Raises `UnsupportedCheckpoint` on a bad file."""
        try:
            with path.open("rb") as file:
                data = np.memmap(file, mode="r")
            metadata, tensors = _Header(memoryview(data.data)).parse()
        except (struct.error, ValueError, IndexError, KeyError, OverflowError) as error:
            raise UnsupportedCheckpoint(f"{path}: not a readable GGUF file: {error}") from None
        return cls(path, metadata, tensors)

    def model_config(self) -> ModelConfig:
        """Sizes and flags. `dtype` is bfloat16: the quantised values carry no more."""
        meta = self.metadata
        if meta.get("general.architecture") != "llama":
            raise UnsupportedCheckpoint(
                f"GGUF architecture {meta.get('general.architecture')!r} is not supported; allowed: llama"
            )
        if meta.get("llama.expert_count"):
            raise UnsupportedCheckpoint("GGUF mixture-of-experts models are not supported")
        try:
            num_heads = int(meta["llama.attention.head_count"])
            hidden_size = int(meta["llama.embedding_length"])
            head_dim = int(meta.get("llama.attention.key_length") or hidden_size // num_heads)
            config = ModelConfig(
                architecture="LlamaForCausalLM",
                vocab_size=self.tensors["token_embd.weight"].shape[0],
                hidden_size=hidden_size,
                intermediate_size=int(meta["llama.feed_forward_length"]),
                num_layers=int(meta["llama.block_count"]),
                num_heads=num_heads,
                num_kv_heads=int(meta.get("llama.attention.head_count_kv") or num_heads),
                head_dim=head_dim,
                max_position=int(meta["llama.context_length"]),
                rms_norm_eps=float(meta["llama.attention.layer_norm_rms_epsilon"]),
                rope_theta=float(meta.get("llama.rope.freq_base", 10000.0)),
                tied_embeddings="output.weight" not in self.tensors,
                qkv_bias="blk.0.attn_q.bias" in self.tensors,
                out_bias="blk.0.attn_output.bias" in self.tensors,
                mlp_bias="blk.0.ffn_gate.bias" in self.tensors,
                eos_token_ids=self._end_tokens(),
                bos_token_id=meta.get("tokenizer.ggml.bos_token_id"),
            )
        except KeyError as error:
            raise UnsupportedCheckpoint(f"{self.path}: {error.args[0]} is missing") from None
        if meta.get("llama.rope.dimension_count", head_dim) != head_dim:
            raise UnsupportedCheckpoint("GGUF models that rotate only part of each head are not supported")
        return checked(self._with_rope(config))

    def weights(self, threads: int = 2) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """Every tensor as (Hugging Face name, fp32 array), dequantised a few at a time.

        Raises `UnsupportedCheckpoint` for a name or a quantisation that is not known.
        """
        config = self.model_config()
        names = [name for name in self.tensors if name != _ROPE_FACTORS]
        targets = [hf_name(name) for name in names]  # all names are checked before the first tensor is read
        threads = min(threads, 4)  # each holds a few tensors in fp32
        with ThreadPoolExecutor(threads) as pool:
            window: list[Any] = []
            for name, target in zip(names, targets, strict=True):
                window.append((target, pool.submit(self._read, name, config)))
                if len(window) > 2 * threads:
                    done, future = window.pop(0)
                    yield done, future.result()
            for done, future in window:
                yield done, future.result()

    def tokenizer_metadata(self) -> dict[str, Any]:
        """All `tokenizer.*` keys: ggml.tokens, .merges, .token_type, .pre, special ids, chat template."""
        return {key: value for key, value in self.metadata.items() if key.startswith("tokenizer.")}

    def _end_tokens(self) -> tuple[int, ...]:
        ids = [self.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
        return tuple(dict.fromkeys(int(token_id) for token_id in ids if token_id is not None))

    def _with_rope(self, config: ModelConfig) -> ModelConfig:
        from dataclasses import replace

        kind = self.metadata.get("llama.rope.scaling.type", "none")
        if kind == "linear":
            factor = float(self.metadata["llama.rope.scaling.factor"])
            return replace(config, rope_scaling=RopeScaling(kind="linear", factor=factor))
        if kind != "none":
            raise UnsupportedCheckpoint(f"GGUF rope scaling {kind!r} is not supported; allowed: linear")
        if _ROPE_FACTORS not in self.tensors:
            return config
        # Llama 3 stores one divisor per frequency instead of its parameters: accept them only if the
        # published parameters give back exactly these divisors
        stored = self._read(_ROPE_FACTORS, config)
        scaling = RopeScaling(kind="llama3", factor=round(float(stored.max()), 4))
        if not np.allclose(stored, _llama3_divisors(config, scaling), rtol=1e-4):
            raise UnsupportedCheckpoint(f"{_ROPE_FACTORS} does not follow Llama 3's rule")
        return replace(config, rope_scaling=scaling)

    def _read(self, name: str, config: ModelConfig) -> NDArray[np.float32]:
        from gguf import GGMLQuantizationType, dequantize
        from gguf.quants import quant_shape_to_byte_shape

        info = self.tensors[name]
        try:
            quant = GGMLQuantizationType(info.type_id)
            if info.type_id == _F32:
                raw = np.memmap(self.path, np.float32, "r", info.offset, info.shape)
                array: NDArray[np.float32] = np.array(raw)
            else:
                shape = quant_shape_to_byte_shape(info.shape, quant)
                raw_bytes = np.memmap(self.path, np.uint8, "r", info.offset, shape)
                array = dequantize(raw_bytes, quant).astype(np.float32, copy=False)
        except (ValueError, NotImplementedError) as error:
            raise UnsupportedCheckpoint(f"{self.path}: tensor {name}: {error}") from None
        part = name.split(".")[-2]
        if part in ("attn_q", "attn_k"):
            array = _unpermute(array, config.num_heads if part == "attn_q" else config.num_kv_heads)
        return array


def hf_name(name: str) -> str:
    """`blk.3.attn_q.weight` → `model.layers.3.self_attn.q_proj.weight`."""
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[1].isdigit() and parts[2] in _LAYER_NAMES:
        return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.{parts[3]}"
    raise UnsupportedCheckpoint(f"GGUF tensor {name} is not known")


def _unpermute(array: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    # llama.cpp interleaves the two halves of each head's rows: [heads, d/2, 2, ...] → [heads, 2, d/2, ...]
    split = array.reshape(num_heads, array.shape[0] // num_heads // 2, 2, *array.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(array.shape)


def _llama3_divisors(config: ModelConfig, scaling: RopeScaling) -> NDArray[np.float64]:
    exponent = np.arange(0, config.head_dim, 2) / config.head_dim
    wavelength = 2 * np.pi * config.rope_theta**exponent
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = np.clip((scaling.original_max_position / wavelength - low) / (high - low), 0, 1)
    divisors: NDArray[np.float64] = 1 / ((1 - smooth) / scaling.factor + smooth)
    return divisors


class _Header:
    """One pass over the header bytes; every read past the end raises."""

    def __init__(self, view: memoryview) -> None:
        self.view = view
        self.at = 0

    def parse(self) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
        if bytes(self.view[:4]) != b"GGUF":
            raise ValueError("the magic number is missing")
        self.at = 4
        version = self.scalar("I")
        if version not in (2, 3):
            raise ValueError(f"version {version} is not supported (little-endian 2 and 3 are)")
        num_tensors, num_keys = self.scalar("Q"), self.scalar("Q")
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self.string()
            metadata[key] = self.value(self.scalar("I"))
        found: dict[str, TensorInfo] = {}
        for _ in range(num_tensors):
            name = self.string()
            shape = tuple(self.scalar("Q") for _ in range(self.scalar("I")))[::-1]
            found[name] = TensorInfo(shape, self.scalar("I"), self.scalar("Q"))
        align = int(metadata.get("general.alignment", 32))
        data = -(-self.at // align) * align
        for name, info in found.items():
            found[name] = info._replace(offset=info.offset + data)
            if info.offset + data + prod(info.shape) // 8 > len(self.view):
                raise ValueError(f"tensor {name} lies beyond the end of the file")
        return metadata, found

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.view, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        (length,) = struct.unpack_from("<Q", self.view, self.at)
        start = self.at + 8
        self.at = start + length
        if self.at > len(self.view):
            raise ValueError("a string runs past the end of the file")
        return str(self.view[start : self.at], "utf-8", "replace")

    def value(self, type_id: int) -> Any:
        if type_id == _STRING:
            return self.string()
        if type_id != _ARRAY:
            return self.scalar(_SCALARS[type_id])
        item, count = self.scalar("I"), self.scalar("Q")
        if item in (_STRING, _ARRAY):
            return [self.value(item) for _ in range(count)]
        array = np.frombuffer(self.view, np.dtype("<" + _SCALARS[item]), count, self.at)
        self.at += array.nbytes
        return array.tolist()
