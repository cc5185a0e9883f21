"""Families as data: what each architecture is beyond a plain Llama.

Owns the table. Knows no files and no tensors. A new family is one entry in `FAMILIES`; no other code branches on its
name. What a family says in words of its own is read in `family_fields`, how it names its tensors stands in
`family_storage`, and how an entry is applied to a `config.json` in `config_json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from engine import family_fields, family_storage
from engine.family import Family
from engine.model_config import Storage
from engine.text_part import rotated_by_one_position
from engine.windows import all_but_every, all_layers, by_layer_types, every_layer, upper_layers

_LAYER_NORMS = {"norm_kind": "layer", "norm_bias": True, "gated_mlp": False}
_NO_BIAS = {"attention_bias": False, "attention_out_bias": False, "mlp_bias": False}

_NO_MLP_BIAS = {"mlp_bias": False}
_GLM_NO_BIAS = {**_NO_MLP_BIAS, "attention_out_bias": False}

_QWEN_WINDOW = {"use_sliding_window": False, "sliding_window": 4096}
_GEMMA_FLAGS = {"norm_offset": 1.0, "norm_position": "both", "rounds_embedding_multiplier": True}

_MISTRAL = Family(
    defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    always={**_NO_BIAS, "use_sliding_window": True},
    windowed=by_layer_types(all_layers),  # Ministral's has layer_types
)
_MINISTRAL3 = Family(
    defaults={
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-5,
    },
    fields=family_fields.ministral3_fields,
    always={**_NO_BIAS, "use_sliding_window": True},
    read_flags=family_fields.original_positions,
    windowed=every_layer,
)
_QWEN2 = Family(
    defaults={"num_key_value_heads": 32, "max_position_embeddings": 32768, **_QWEN_WINDOW},
    always={**_NO_BIAS, "attention_bias": True},
    windowed=by_layer_types(upper_layers),
)
_QWEN2_VL = replace(
    _QWEN2,
    defaults={
        **_QWEN2.defaults,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "max_window_layers": 80,
    },
    fields=rotated_by_one_position,
)
_QWEN3 = Family(
    defaults={
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        **_QWEN_WINDOW,
    },
    always={"mlp_bias": False},
    flags={"qk_norm": "head"},
    windowed=by_layer_types(upper_layers),
)
_QWEN3_VL = replace(
    _QWEN3,
    defaults={**_QWEN3.defaults, "max_position_embeddings": 128000, "rope_theta": 500000.0},
    fields=rotated_by_one_position,
    windowed=None,
)
_GEMMA3 = Family(
    words=family_fields.GEMMA_WORDS,
    defaults={
        **family_fields.GEMMA_DEFAULTS,
        "max_position_embeddings": 131072,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
    },
    # transformers reads the last one only where the layers do not differ
    always={
        "mlp_bias": False,
        "use_sliding_window": True,
        "original_max_position_embeddings": None,
    },
    only={"attn_logit_softcapping": None},  # transformers reads it and ignores it
    flags={**_GEMMA_FLAGS, "qk_norm": "head"},
    read_flags=family_fields.gemma3_flags,
    windowed=by_layer_types(all_but_every(6)),
)

FAMILIES: Mapping[str, Family] = {
    # Llama 1 to 3 and its many relatives under the same name, SmolLM2 among them
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": _MISTRAL,
    "Ministral3ForCausalLM": _MINISTRAL3,
    # Mistral Small from 3.1 on, and Ministral 3
    "Mistral3ForConditionalGeneration": Family(text_kinds={"mistral": _MISTRAL, "ministral3": _MINISTRAL3}),
    "Qwen2ForCausalLM": _QWEN2,
    "Qwen2VLForConditionalGeneration": Family(text_kinds={"qwen2_vl_text": _QWEN2_VL}),
    "Qwen2_5_VLForConditionalGeneration": Family(text_kinds={"qwen2_5_vl_text": _QWEN2_VL}),
    "Qwen3ForCausalLM": _QWEN3,
    "Qwen3VLForConditionalGeneration": Family(text_kinds={"qwen3_vl_text": _QWEN3_VL}),
    "Olmo2ForCausalLM": Family(
        defaults={"rms_norm_eps": 1e-5},
        always={"mlp_bias": False},
        flags={"qk_norm": "all", "norm_position": "after"},
    ),
    "Olmo3ForCausalLM": Family(
        defaults={"rms_norm_eps": 1e-5, "rope_theta": 500000.0, "sliding_window": 4096},
        always={"mlp_bias": False, "use_sliding_window": True, "sliding_window_pattern": 4},
        flags={"qk_norm": "all", "norm_position": "after"},
        read_flags=family_fields.scaled_without_window,
        windowed=by_layer_types(all_but_every(4)),
    ),
    "Exaone4ForCausalLM": Family(
        defaults={"num_key_value_heads": 32, "rms_norm_eps": 1e-5, "sliding_window": 4096},
        always={**_NO_BIAS, "use_sliding_window": True},
        flags={"qk_norm": "head", "norm_position": "after"},
        read_flags=family_fields.exaone4_flags,
        windowed=family_fields.exaone4_windows,
    ),
    "SmolLM3ForCausalLM": Family(
        defaults={
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "rope_theta": 2000000.0,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
        },
        read_flags=family_fields.no_rope_layers,
        windowed=by_layer_types(family_fields.windowed_without_rope),
    ),
    "Phi3ForCausalLM": Family(
        defaults={
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
        },
        always={**_NO_BIAS, "use_sliding_window": True},
        flags={"storage": Storage(qkv="stacked", gate_up="stacked")},
        read_flags=family_fields.partial_rotary,
        windowed=every_layer,
    ),
    "GraniteForCausalLM": Family(read_flags=family_fields.multipliers),
    "SeedOssForCausalLM": Family(
        defaults={
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 524288,
            "attention_bias": True,
            "attention_out_bias": False,
        },
    ),
    "Gemma2ForCausalLM": Family(
        words=family_fields.GEMMA_WORDS,
        defaults={
            **family_fields.GEMMA_DEFAULTS,
            "max_position_embeddings": 8192,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        always={"mlp_bias": False, "use_sliding_window": True, "sliding_window_pattern": 2},
        flags=_GEMMA_FLAGS,
        read_flags=family_fields.gemma_flags,
        windowed=by_layer_types(all_but_every(2)),
    ),
    "Gemma3ForCausalLM": _GEMMA3,
    "Gemma3ForConditionalGeneration": Family(
        text_kinds={
            "gemma3_text": replace(_GEMMA3, defaults={**_GEMMA3.defaults, **family_fields.GEMMA3_SIZES})
        }
    ),
    "GlmForCausalLM": Family(
        defaults=family_fields.GLM_DEFAULTS,
        always=_GLM_NO_BIAS,
        flags={"storage": family_storage.GLM_STORAGE},
        read_flags=family_fields.partial_rotary,
    ),
    "Glm4ForCausalLM": Family(
        defaults=family_fields.GLM_DEFAULTS,
        always=_GLM_NO_BIAS,
        flags={"norm_position": "both", "storage": family_storage.GLM4_STORAGE},
        read_flags=family_fields.partial_rotary,
    ),
    "Ernie4_5ForCausalLM": Family(
        words={"use_bias": "attention_bias"},
        defaults={
            "num_key_value_heads": 2,
            "head_dim": 128,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
        },
        fields=lambda config: {"mlp_bias": bool(config.get("attention_bias"))},
        flags={"storage": Storage(rotary="pairs")},
    ),
    "Cohere2ForCausalLM": Family(
        words={"layer_norm_eps": "rms_norm_eps"},
        defaults={
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "logit_scale": 0.0625,
            "tie_word_embeddings": True,
            "sliding_window": 4096,
        },
        always={**_NO_MLP_BIAS, "use_sliding_window": True, "head_dim": None},
        flags={
            "norm_kind": "layer",
            "norm_position": "shared",
            "parallel": True,
            "storage": Storage(rotary="pairs"),
        },
        read_flags=family_fields.cohere2_flags,
        windowed=family_fields.cohere2_windows,
    ),
    "GPT2LMHeadModel": Family(
        words=family_fields.GPT2_WORDS,
        defaults={
            "max_position_embeddings": 1024,
            "hidden_act": "gelu_new",
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
        },
        fields=family_fields.four_times_wide,
        always={
            "attention_bias": True,
            "mlp_bias": True,
            "num_key_value_heads": None,
        },
        only={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
        flags={**_LAYER_NORMS, "positions": "learned", "storage": family_storage.GPT2_STORAGE},
    ),
    "GPTNeoXForCausalLM": Family(
        words=family_fields.NEOX_WORDS,
        defaults={
            "hidden_act": "gelu",
            "rms_norm_eps": 1e-5,
            "partial_rotary_factor": 0.25,
            "attention_bias": True,
        },
        always={"mlp_bias": True, "num_key_value_heads": None},
        flags={**_LAYER_NORMS, "storage": family_storage.NEOX_STORAGE},
        read_flags=family_fields.neox_flags,
    ),
    "FalconForCausalLM": Family(
        words=family_fields.FALCON_WORDS,
        defaults={"hidden_act": "gelu", "rms_norm_eps": 1e-5, "tie_word_embeddings": True},
        fields=family_fields.falcon_fields,
        only={"apply_residual_connection_post_layernorm": False},
        flags={**_LAYER_NORMS, "storage": family_storage.FALCON_STORAGE},
        read_flags=family_fields.falcon_flags,
    ),
    "MixtralForCausalLM": Family(
        defaults={
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        always={**_NO_BIAS, "use_sliding_window": True},
        flags={"storage": family_storage.MIXTRAL_STORAGE},
        read_flags=family_fields.mixtral_experts,
        windowed=every_layer,
    ),
    "Qwen3MoeForCausalLM": Family(
        words={"num_experts": "num_local_experts"},
        defaults={
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            **_QWEN_WINDOW,
            "num_local_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": False,
            "decoder_sparse_step": 1,
        },
        always={"mlp_bias": False},
        flags={"qk_norm": "head"},
        read_flags=family_fields.qwen3_experts,
        windowed=every_layer,
    ),
    "GptOssForCausalLM": Family(
        words={"num_experts": "num_local_experts"},
        defaults=family_fields.GPT_OSS_DEFAULTS,
        fields=family_fields.gpt_oss_fields,
        # transformers ignores the first of them
        always={
            "hidden_act": "silu",
            "mlp_bias": True,
            "use_sliding_window": True,
            "sliding_window_pattern": 2,
        },
        only={"swiglu_alpha": 1.702, "swiglu_limit": 7.0},
        flags={
            "activation": "swiglu_oai",
            "attention_sinks": True,
            "storage": family_storage.GPT_OSS_STORAGE,
        },
        read_flags=family_fields.gpt_oss_experts,
        windowed=by_layer_types(all_but_every(2)),
    ),
}
