"""How config.json says that positions are rotated → theta and `RopeScaling`.

Owns the fields `rope_parameters` (transformers 5), `rope_theta` and `rope_scaling` (4), which of them counts where
both are there, and the refusal of kinds that cannot be computed exactly. Knows no families and no frequencies (`rope`
does).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from engine.model_config import RopeScaling, UnsupportedCheckpoint


def rope_parameters(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Those of the layers that see everything, where layers with a window have some of their own.

    `rope_scaling` goes over them field by field there, else it takes the place of the whole `rope_parameters`, as in
    transformers. Raises `UnsupportedCheckpoint` where that would lose a field which nobody meant to change.
    """
    parameters: Mapping[str, Any] = config.get("rope_parameters") or {}
    scaling: Mapping[str, Any] = config.get("rope_scaling") or {}
    if any(isinstance(value, Mapping) for value in scaling.values()):
        raise UnsupportedCheckpoint(
            "rope_scaling by kind of layer is not supported; say it in rope_parameters"
        )
    if "full_attention" in parameters:
        return {**(parameters["full_attention"] or {}), **scaling}
    if not scaling:
        return parameters
    for name, otherwise in (("rope_theta", 10000.0), ("partial_rotary_factor", 1.0)):
        lost = parameters.get(name)
        if name not in scaling and lost is not None and lost != config.get(name, otherwise):
            raise UnsupportedCheckpoint(
                f"rope_scaling takes the place of rope_parameters, whose {name} ({lost}) it lacks: "
                f"write {name} into rope_scaling, or all of it into rope_parameters"
            )
    return scaling


def windowed_rope_theta(config: Mapping[str, Any]) -> float | None:
    """Theta of the layers with a window, where it is said apart. They are not scaled."""
    found = (config.get("rope_parameters") or {}).get("sliding_attention") or {}
    kind = found.get("rope_type", "default")
    if kind != "default":
        raise UnsupportedCheckpoint(
            f"rope_type {kind!r} of sliding_attention is not supported; allowed: default"
        )
    theta = found.get("rope_theta") or config.get("rope_local_base_freq")
    return None if theta is None else float(theta)


def rope_settings(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Theta and scaling. Raises `UnsupportedCheckpoint` naming the kind or the field."""
    parameters = rope_parameters(config)
    theta = float(parameters.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind in ("su", "yarn") and "long_factor" in parameters:
        kind = "longrope"  # as Phi-3 was first published
    max_position = int(config.get("max_position_embeddings", 2048))
    original = int(
        config.get("original_max_position_embeddings")  # beside them it wins, as in transformers
        or parameters.get("original_max_position_embeddings")
        or max_position
    )
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling(kind="linear", factor=float(parameters["factor"]))
    if kind == "llama3":
        return theta, RopeScaling(
            kind="llama3",
            factor=float(parameters["factor"]),
            low_freq_factor=float(parameters["low_freq_factor"]),
            high_freq_factor=float(parameters["high_freq_factor"]),
            original_max_position=original,
        )
    if kind == "yarn":
        return theta, _yarn(parameters, original)
    if kind == "longrope":
        return theta, _longrope(parameters, max_position, original)
    if kind == "dynamic":
        raise UnsupportedCheckpoint(
            "rope_type 'dynamic' is not supported: it rotates a token by the length of its whole sequence, "
            "so that what is stored of earlier tokens would be wrong with every token that is added"
        )
    raise UnsupportedCheckpoint(
        f"rope_type {kind!r} is not supported; allowed: default, linear, llama3, yarn, longrope"
    )


def _longrope(parameters: Mapping[str, Any], max_position: int, original: int) -> RopeScaling:
    factor = float(parameters.get("factor") or max_position / original)
    attention_factor = parameters.get("attention_factor")
    if attention_factor is None:
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1.0 else 1.0
    return RopeScaling(
        kind="longrope",
        factor=factor,
        original_max_position=original,
        short_factors=tuple(float(divisor) for divisor in parameters["short_factor"]),
        long_factors=tuple(float(divisor) for divisor in parameters["long_factor"]),
        attention_factor=float(attention_factor),
    )


def _yarn(parameters: Mapping[str, Any], original: int) -> RopeScaling:
    factor = float(parameters["factor"])
    if factor < 1.0:
        raise UnsupportedCheckpoint(f"factor of rope_type yarn must be at least 1, not {factor}")
    attention_factor = parameters.get("attention_factor")
    if attention_factor is None:
        some, all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
        attention_factor = _mscale(factor, 1.0)
        if some and all_dim:
            attention_factor = _mscale(factor, float(some)) / _mscale(factor, float(all_dim))
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_max_position=original,
        beta_fast=float(parameters.get("beta_fast") or 32.0),
        beta_slow=float(parameters.get("beta_slow") or 1.0),
        truncate=bool(parameters.get("truncate", True)),
        attention_factor=float(attention_factor),
    )


def _mscale(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0
