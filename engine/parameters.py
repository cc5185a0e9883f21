"""The names and shapes of every tensor that a decoder holds.

Owns the canonical names: those of Llama on Hugging Face (of Qwen3-MoE where there are experts), with q, k, v merged
into `qkv_proj` and gate, up into `gate_up_proj` (one product each instead of three and two). Knows no files
(`weights` does) and no computation.
"""

from __future__ import annotations

from collections.abc import Mapping

from engine.model_config import ModelConfig

# Of a block's four norms over the hidden channels, by `norm_position`: its name in checkpoints
NORM_NAMES: Mapping[str, Mapping[str, str]] = {
    "before": {"attention": "input_layernorm", "mlp": "post_attention_layernorm"},
    "shared": {"attention": "input_layernorm"},
    "after": {"out": "post_attention_layernorm", "down": "post_feedforward_layernorm"},
    "both": {
        "attention": "input_layernorm",
        "out": "post_attention_layernorm",
        "mlp": "pre_feedforward_layernorm",
        "down": "post_feedforward_layernorm",
    },
}


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor the decoder holds. A tied head has no tensor of its own."""
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    if config.positions == "learned":
        shapes["model.embed_positions.weight"] = (config.max_position, hidden)
    for i in range(config.num_layers):
        layer = f"model.layers.{i}"
        for norm in NORM_NAMES[config.norm_position].values():
            shapes |= _norm(config, f"{layer}.{norm}")
        shapes |= _attention(config, f"{layer}.self_attn")
        if (moe := config.moe) is None or i in moe.dense_layers:
            shapes |= _mlp(config, f"{layer}.mlp", config.intermediate_size)
        else:
            shapes |= _product(f"{layer}.mlp.gate", moe.num_experts, hidden, bias=moe.router_bias)
            for expert in range(moe.num_experts):
                shapes |= _mlp(config, f"{layer}.mlp.experts.{expert}", moe.intermediate_size)
    shapes |= _norm(config, "model.norm")
    if not config.tied_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def expert_stacks(config: ModelConfig) -> dict[str, list[str]]:
    """What kernels that compute all (gated) experts of a layer at once want side by side: name of a stack of weights
    or biases → names of the parameters in it, expert by expert."""
    if config.moe is None:
        return {}
    parts = ("weight", "bias") if config.mlp_bias else ("weight",)
    return {
        f"model.layers.{i}.mlp.experts.{kind}.{part}": [
            f"model.layers.{i}.mlp.experts.{expert}.{kind}.{part}" for expert in range(config.moe.num_experts)
        ]
        for i in range(config.num_layers)
        if i not in config.moe.dense_layers
        for kind in ("gate_up_proj", "down_proj")
        for part in parts
    }


def _norm(config: ModelConfig, name: str) -> dict[str, tuple[int, ...]]:
    kinds = ("weight", "bias") if config.norm_bias else ("weight",)
    return {f"{name}.{kind}": (config.hidden_size,) for kind in kinds}


def _attention(config: ModelConfig, part: str) -> dict[str, tuple[int, ...]]:
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes = _product(f"{part}.qkv_proj", heads + 2 * kv_heads, config.hidden_size, config.qkv_bias)
    if config.qk_norm is not None:
        each = config.qk_norm == "head"
        shapes[f"{part}.q_norm.weight"] = (config.head_dim if each else heads,)
        shapes[f"{part}.k_norm.weight"] = (config.head_dim if each else kv_heads,)
    if config.attention_sinks:
        shapes[f"{part}.sinks"] = (config.num_heads,)
    return shapes | _product(f"{part}.o_proj", config.hidden_size, heads, config.out_bias)


def _mlp(config: ModelConfig, part: str, inner: int) -> dict[str, tuple[int, ...]]:
    name, rows = ("gate_up_proj", 2 * inner) if config.gated_mlp else ("up_proj", inner)
    return _product(f"{part}.{name}", rows, config.hidden_size, config.mlp_bias) | _product(
        f"{part}.down_proj", config.hidden_size, inner, config.mlp_bias
    )


def _product(name: str, outputs: int, inputs: int, bias: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (outputs, inputs)}
    if bias:
        shapes[f"{name}.bias"] = (outputs,)
    return shapes
