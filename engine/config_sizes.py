"""Whether the sizes of a `ModelConfig` agree with each other.

Owns that check, made once where a config.json or a GGUF file has been read. Knows no families and no fields'
histories (`families` does): it names sizes by the words that config.json has for them.
"""

from __future__ import annotations

from engine.model_config import ModelConfig, UnsupportedCheckpoint


def checked(config: ModelConfig) -> ModelConfig:
    """The same config, or `UnsupportedCheckpoint` when its sizes contradict each other."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
    for name in (*names, "max_position"):
        if getattr(config, name) < 1:
            raise UnsupportedCheckpoint(f"{name} must be at least 1, not {getattr(config, name)}")
    if config.num_heads % config.num_kv_heads:
        raise UnsupportedCheckpoint(
            f"num_attention_heads ({config.num_heads}) must be a multiple of "
            f"num_key_value_heads ({config.num_kv_heads})"
        )
    if config.moe is not None and not 1 <= config.moe.num_per_token <= config.moe.num_experts:
        raise UnsupportedCheckpoint(
            f"num_experts_per_tok must be 1 to {config.moe.num_experts}, not {config.moe.num_per_token}"
        )
    if config.head_dim < 2 or config.head_dim % 2:
        raise UnsupportedCheckpoint(f"head_dim must be even, not {config.head_dim}")
    if not 2 <= config.rotary_dim <= config.head_dim or config.rotary_dim % 2:
        raise UnsupportedCheckpoint(
            f"partial_rotary_factor {config.partial_rotary_factor} of head_dim {config.head_dim} must be "
            f"an even number of channels"
        )
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "longrope":
        for name, factors in (("short_factor", scaling.short_factors), ("long_factor", scaling.long_factors)):
            if len(factors) != config.rotary_dim // 2 or not all(factor > 0 for factor in factors):
                raise UnsupportedCheckpoint(
                    f"{name} of rope_type longrope must be {config.rotary_dim // 2} numbers above 0"
                )
    return config
