"""Which layers attend within a window, and how long it is, as config.json says it.

Owns the fields `sliding_window`, `use_sliding_window`, `layer_types`, and the patterns by which transformers fills
in the last. Knows no attention and no names of families: each family says which rule is its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from engine.model_config import UnsupportedCheckpoint

Config = Mapping[str, Any]
Windowed = Callable[[Config], Sequence[bool]]  # whether each layer attends within the window


def windows(config: Config, windowed: Windowed | None) -> tuple[int | None, ...]:
    """The window of each layer, None where it sees everything; empty where all of them do.

    Raises `UnsupportedCheckpoint` naming the field that is missing or contradicts another.
    """
    if windowed is None:
        return ()
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    inside = windowed({**config, "sliding_window": window})
    if not any(inside):
        return ()
    if window is None:
        raise UnsupportedCheckpoint("layer_types has sliding_attention, but no sliding_window is in effect")
    if int(window) < 1:
        raise UnsupportedCheckpoint(f"sliding_window must be at least 1, not {window}")
    return tuple(int(window) if within else None for within in inside)


def every_layer(config: Config) -> list[bool]:
    """Whatever `layer_types` says."""
    return [all_layers(config, i) for i in range(int(config["num_hidden_layers"]))]


def by_layer_types(otherwise: Callable[[Config, int], bool]) -> Windowed:
    """As `layer_types` says; where it is left out, as `otherwise` says of each layer."""

    def windowed(config: Config) -> list[bool]:
        num_layers, types = int(config["num_hidden_layers"]), config.get("layer_types")
        if types is None:
            return [otherwise(config, i) for i in range(num_layers)]
        unknown = set(types) - {"sliding_attention", "full_attention"}
        if unknown:
            raise UnsupportedCheckpoint(
                f"layer_types has {min(unknown)!r}; allowed: sliding_attention, full_attention"
            )
        if len(types) != num_layers:
            raise UnsupportedCheckpoint(f"layer_types has {len(types)} entries for {num_layers} layers")
        return [kind == "sliding_attention" for kind in types]

    return windowed


def all_layers(config: Config, layer: int) -> bool:
    return config["sliding_window"] is not None


def upper_layers(config: Config, layer: int) -> bool:
    """Those from `max_window_layers` on (Qwen)."""
    return config["sliding_window"] is not None and layer >= int(config.get("max_window_layers", 28))


def all_but_every(pattern: int) -> Callable[[Config, int], bool]:
    """All but every n-th (Gemma); config.json may say n as `sliding_window_pattern`."""
    return lambda config, layer: (layer + 1) % int(config.get("sliding_window_pattern", pattern)) > 0
