"""Quantisation: how the weights of a safetensors checkpoint are stored in 4 or 8 bits, as its config.json says.

Owns the reading of `quantization_config` (AWQ, GPTQ, FP8, compressed-tensors, MXFP4) into one frozen value, and the
refusal, by field, of what cannot be undone exactly. Knows no torch, no files and no tensors (`quantised_source`
does). What such files say about activations is left aside: products are computed in the engine's dtype.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from engine.model_config import UnsupportedCheckpoint

Fields = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedIntegers:
    """Each weight is (integer - zero) · scale; integers and zeros lie in words of 32 bits.

    awq: eight outputs of one input share a word. gptq: 32 / `bits` inputs of one output do, and 32 / `bits` outputs
    where they are zeros.
    """

    method: Literal["awq", "gptq"]
    bits: Literal[4, 8]
    group_size: int | None  # inputs that share a zero and a scale; None: all of them
    act_order: bool = False  # inputs are sorted into groups by `g_idx`, not by their places
    zeros_less_one: bool = False  # zeros are stored minus 1
    plain: tuple[str, ...] = ()  # modules that are not quantised, see `is_plain`


@dataclass(frozen=True, slots=True, kw_only=True)
class Float8:
    """Each weight is a float of 8 bits (E4M3) · scale."""

    method: Literal["fp8", "compressed-tensors"]
    block: tuple[int | None, int | None]  # outputs and inputs that share a scale; None: all of them
    scale_names: tuple[str, ...]  # what the scale may be called beside `weight`
    plain: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Float4Blocks:
    """Each weight of an expert is a float of 4 bits (E2M1) · 2^scale, one scale for 32 inputs of an output."""

    method: Literal["mxfp4"] = "mxfp4"
    plain: tuple[str, ...] = ()


Quantisation = PackedIntegers | Float8 | Float4Blocks


def read_quantisation(config: Fields) -> Quantisation | None:
    """`quantization_config` of a `config.json`; None: the weights are stored plainly.

    Raises `UnsupportedCheckpoint` naming the field that is not supported and what is allowed.
    """
    given = config.get("quantization_config")
    if not given:
        return None
    method = given.get("quant_method") if isinstance(given, Mapping) else given
    try:
        if not isinstance(given, Mapping) or not isinstance(method, str) or method not in _READERS:
            raise _Refused(f"quant_method {method!r} is not supported; allowed: {', '.join(_READERS)}")
        return _READERS[method](given)
    except _Refused as error:
        raise UnsupportedCheckpoint(
            f"quantization_config ({method}): {error}. Otherwise use the original weights, or a GGUF file of them"
        ) from None


def is_plain(module: str, plain: tuple[str, ...]) -> bool:
    """Whether one of `plain` is the module's name, the first or the last parts of it, or, behind `re:`, a regular
    expression that matches from its beginning."""
    for entry in plain:
        if entry.startswith("re:"):
            if re.match(entry[3:], module):
                return True
        elif module == entry or module.startswith(f"{entry}.") or module.endswith(f".{entry}"):
            return True
    return False


class _Refused(ValueError):
    """A field and what is allowed for it."""


def _awq(given: Fields) -> PackedIntegers:
    _only(given, ("bits", "w_bit"), (4,))
    _only(given, ("zero_point",), (True,), default=True)
    version = str(_first(given, ("version", "format", "checkpoint_format"), "gemm"))
    if version.lower() != "gemm":
        raise _Refused(f"version {version!r} is not supported; allowed: gemm")
    return PackedIntegers(
        method="awq",
        bits=4,
        group_size=_group_size(given, ("group_size", "q_group_size")),
        plain=_names(given, "modules_to_not_convert"),
    )


def _gptq(given: Fields) -> PackedIntegers:
    bits = _only(given, ("bits",), (4, 8))
    layout = _only(given, ("checkpoint_format", "format"), ("gptq", "gptq_v2"), default="gptq")
    _only(given, ("is_marlin_format",), (False, None), default=None)
    _only(given, ("pack_dtype",), ("int32", None), default=None)
    if given.get("dynamic"):
        raise _Refused("dynamic (settings of single modules) is not supported; allowed: none")
    return PackedIntegers(
        method="gptq",
        bits=bits,
        group_size=_group_size(given, ("group_size",)),
        act_order=_only(given, ("desc_act",), (True, False), default=False),
        zeros_less_one=layout == "gptq",
        plain=_names(given, "modules_to_not_convert"),
    )


def _fp8(given: Fields) -> Float8:
    _only(given, ("activation_scheme",), ("dynamic", "static"), default="dynamic")
    _only(given, ("fmt",), ("e4m3",), default="e4m3")
    _only(given, ("expert_dtype",), ("fp8", None), default=None)
    _only(given, ("kv_cache_scheme",), (None,), default=None)
    block = given.get("weight_block_size")
    return Float8(
        method="fp8",
        block=(None, None) if block is None else _block("weight_block_size", block),
        scale_names=("weight_scale_inv",) if block is not None else ("weight_scale", "weight_scale_inv"),
        plain=_names(given, "modules_to_not_convert") + _names(given, "ignored_layers"),
    )


def _compressed_tensors(given: Fields) -> Float8:
    _only(given, ("format",), ("float-quantized",))
    _only(given, ("quantization_status",), ("compressed", None), default=None)
    _only(given, ("kv_cache_scheme",), (None,), default=None)
    sparsity = given.get("sparsity_config")
    if sparsity and (not isinstance(sparsity, Mapping) or sparsity.get("format", "dense") != "dense"):
        raise _Refused("sparsity_config is not supported; allowed: none, or format dense")
    if given.get("transform_config"):
        raise _Refused("transform_config is not supported; allowed: none")
    groups = given.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise _Refused("config_groups must name at least one group")
    blocks = {_block_of(name, group) for name, group in groups.items()}
    if len(blocks) > 1:
        raise _Refused("config_groups of different weights.strategy are not supported; allowed: one for all")
    return Float8(
        method="compressed-tensors",
        block=blocks.pop(),
        scale_names=("weight_scale",),
        plain=_names(given, "ignore"),
    )


def _block_of(name: str, group: Any) -> tuple[int | None, int | None]:
    """Outputs and inputs that share a scale, in one group of compressed-tensors."""
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        raise _Refused(f"config_groups.{name}.weights is missing")
    _only(group, ("format",), ("float-quantized", None), default=None)
    _only(group, ("output_activations",), (None,), default=None)
    _only(weights, ("type",), ("float",))
    _only(weights, ("num_bits",), (8,))
    _only(weights, ("symmetric",), (True,), default=True)
    _only(weights, ("dynamic",), (False,), default=False)
    strategy = _only(weights, ("strategy",), ("channel", "tensor", "block"))
    if strategy == "block":
        return _block("block_structure", weights.get("block_structure"))
    return (1, None) if strategy == "channel" else (None, None)


def _mxfp4(given: Fields) -> Float4Blocks:
    """transformers reads the names as regular expressions, in which a star between dots stands for any part."""
    return Float4Blocks(plain=tuple(map(_unstarred, _names(given, "modules_to_not_convert"))))


def _unstarred(name: str) -> str:
    if "*" not in name or name.startswith("re:"):
        return name
    return "re:" + ".*".join(map(re.escape, name.split("*"))) + r"(\.|$)"


_READERS: Mapping[str, Callable[[Fields], Quantisation]] = {
    "awq": _awq,
    "gptq": _gptq,
    "fp8": _fp8,
    "compressed-tensors": _compressed_tensors,
    "mxfp4": _mxfp4,
}


def _first(given: Fields, names: tuple[str, ...], default: Any = None) -> Any:
    """The value under the first of `names` that is there."""
    return next((given[name] for name in names if given.get(name) is not None), default)


def _only(given: Fields, names: tuple[str, ...], allowed: tuple[Any, ...], default: Any = ...) -> Any:
    """The value under the first of `names` that is there, which must be one of `allowed`."""
    value = _first(given, names, default)
    if value is ...:
        raise _Refused(f"{names[0]} is missing")
    if not any(type(value) is type(one) and value == one for one in allowed):
        told = ", ".join(str(one) for one in allowed if one is not None) or "none"
        raise _Refused(f"{names[0]} {value!r} is not supported; allowed: {told}")
    return value


def _group_size(given: Fields, names: tuple[str, ...]) -> int | None:
    size = _first(given, names)
    if type(size) is not int or (size < 1 and size != -1):
        raise _Refused(f"{names[0]} must be at least 1, or -1 for all inputs, not {size!r}")
    return None if size == -1 else size


def _block(name: str, block: Any) -> tuple[int, int]:
    if isinstance(block, str):  # older files: "128x128"
        block = [int(size) if size.isdecimal() else size for size in block.split("x")]
    if (
        not isinstance(block, list)
        or len(block) != 2
        or any(type(size) is not int or size < 1 for size in block)
    ):
        raise _Refused(f"{name} must be two whole numbers of at least 1, not {block!r}")
    return block[0], block[1]


def _names(given: Fields, field: str) -> tuple[str, ...]:
    names = given.get(field) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _Refused(f"{field} must be a list of names, not {names!r}")
    for name in names:
        if not name.startswith("re:"):
            continue
        try:
            re.compile(name[3:])
        except re.error as error:
            raise _Refused(f"{field}: {name!r} is no regular expression: {error}") from None
    return tuple(names)
