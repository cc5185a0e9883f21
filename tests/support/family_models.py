"""The tiny models of every family that tests compare: one row per kind of a family, in transformers' own words.

Owns the list: what each model changes of `tests.support.tiny.SIZES` and of its family's defaults.
"""

from __future__ import annotations

from typing import Any

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.5, 1.5, 1.7, 2.0, 2.5],
    "long_factor": [1.0, 1.5, 2.5, 4.0, 5.0, 8.0, 16.0, 20.0],
}
SIGLIP = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
PIXTRAL = {**SIGLIP, "model_type": "pixtral", "head_dim": 8}
MINISTRAL_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 900.0,
    "factor": 4.0,
    "original_max_position_embeddings": 512,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
QWEN_EYES = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 64}
MODELS: dict[str, tuple[dict[str, Any], ...]] = {
    "LlamaForCausalLM": (
        {
            "num_key_value_heads": 4,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        },
        {
            "num_attention_heads": 6,
            "hidden_size": 96,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
        {"num_key_value_heads": 1, "head_dim": 40, "vocab_size": 333},
    ),
    "Ministral3ForCausalLM": (
        {
            "head_dim": 24,
            "sliding_window": 9,
            "max_position_embeddings": 2048,
            "rope_parameters": MINISTRAL_ROPE,
        },
    ),
    "Mistral3ForConditionalGeneration": (
        {
            "vision_config": PIXTRAL,
            "text_config": {"model_type": "mistral", "head_dim": 24, "sliding_window": 9},
            "tie_word_embeddings": False,
        },
        {
            "vision_config": PIXTRAL,
            "text_config": {
                "model_type": "ministral3",
                "head_dim": 16,
                "max_position_embeddings": 2048,
                "rope_parameters": MINISTRAL_ROPE,
            },
            "tie_word_embeddings": False,
        },
    ),
    "Qwen2ForCausalLM": (
        {},
        {
            "tie_word_embeddings": True,
            "num_attention_heads": 6,
            "hidden_size": 96,
            "vocab_size": 333,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
    "MistralForCausalLM": (
        {"sliding_window": 8, "head_dim": 24},
        {"sliding_window": None, "num_key_value_heads": 1, "tie_word_embeddings": True, "rms_norm_eps": 1e-3},
    ),
    "Qwen2VLForConditionalGeneration": (
        {
            "vision_config": {"depth": 1, "embed_dim": 16, "hidden_size": 64, "num_heads": 2},
            "text_config": {
                "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "mrope_section": [2, 3, 3]}
            },
        },
    ),
    "Qwen2_5_VLForConditionalGeneration": (
        {
            "vision_config": QWEN_EYES,
            "text_config": {
                "rope_parameters": {"rope_type": "default", "rope_theta": 900.0, "mrope_section": [2, 3, 3]}
            },
            "tie_word_embeddings": True,
        },
    ),
    "Qwen3ForCausalLM": (
        {"head_dim": 16, "attention_bias": True},
        {
            "head_dim": 40,
            "num_attention_heads": 6,
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 40,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "Qwen3VLForConditionalGeneration": (
        {
            "vision_config": {**QWEN_EYES, "deepstack_visual_indexes": [0]},
            "text_config": {
                "head_dim": 16,
                "attention_bias": True,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 900.0,
                    "mrope_section": [4, 2, 2],
                    "mrope_interleaved": True,
                },
            },
        },
    ),
    "Olmo2ForCausalLM": (
        {"num_attention_heads": 6, "hidden_size": 96, "tie_word_embeddings": True},
        {"attention_bias": True, "num_key_value_heads": 4, "head_dim": 24},
    ),
    "Olmo3ForCausalLM": (
        {
            "num_hidden_layers": 4,
            "sliding_window": 12,
            "num_key_value_heads": 4,
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "yarn",
                    "rope_theta": 5000.0,
                    "factor": 4.0,
                    "original_max_position_embeddings": 32,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
            },
        },
        {
            "sliding_window": 30,
            "layer_types": ["full_attention", "sliding_attention"],
            "attention_bias": True,
            "head_dim": 24,
        },
    ),
    "Exaone4ForCausalLM": (
        {"num_hidden_layers": 4, "sliding_window": 14, "sliding_window_pattern": 2, "head_dim": 24},
        {"sliding_window": 20, "layer_types": ["full_attention"] * 2},  # then no layer rotates
        {
            "sliding_window": None,
            "layer_types": ["full_attention"] * 2,
            "hidden_size": 96,
            "num_attention_heads": 6,
        },
    ),
    "SmolLM3ForCausalLM": (
        {"no_rope_layers": [0, 1], "attention_bias": True, "mlp_bias": True},
        {
            "no_rope_layer_interval": 2,
            "num_hidden_layers": 4,
            "tie_word_embeddings": False,
            "use_sliding_window": True,
            "sliding_window": 20,
        },
    ),
    "Phi3ForCausalLM": (
        {"partial_rotary_factor": 0.75, "num_key_value_heads": 1},
        {"partial_rotary_factor": 0.4, "head_dim": 40, "tie_word_embeddings": True, "sliding_window": 600},
        {"num_attention_heads": 2, "hidden_size": 80, "sliding_window": 33},
        # LongRoPE for sequences that all are longer than the original context, and for none that is
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 12},
        {"rope_parameters": LONGROPE | {"factor": 2.0}, "original_max_position_embeddings": 512},
    ),
    "GraniteForCausalLM": (
        {"attention_bias": True, "mlp_bias": True, "attention_multiplier": 0.3, "tie_word_embeddings": True},
        {
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.0625,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
        },
    ),
    "SeedOssForCausalLM": (
        {"head_dim": 16, "tie_word_embeddings": True},
        {"head_dim": 32, "attention_bias": False, "attention_out_bias": True, "mlp_bias": True},
    ),
    "Gemma2ForCausalLM": (
        {
            "head_dim": 16,
            "sliding_window": 24,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 0.6,
        },
        {
            "head_dim": 24,
            "num_key_value_heads": 1,
            "num_hidden_layers": 3,
            "layer_types": ["full_attention", "full_attention", "sliding_attention"],
            "sliding_window": 8,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "attention_bias": True,
            "tie_word_embeddings": False,
        },
    ),
    "Gemma3ForCausalLM": (
        {
            "head_dim": 16,
            "num_hidden_layers": 3,
            "sliding_window": 12,
            "sliding_window_pattern": 3,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
        {
            "head_dim": 24,
            "hidden_size": 96,
            "num_key_value_heads": 4,
            "sliding_window": 31,
            "layer_types": ["full_attention", "sliding_attention"],
            "query_pre_attn_scalar": 40,
            "tie_word_embeddings": False,
            "final_logit_softcapping": 6.0,
            "attention_bias": True,
        },
    ),
    "Gemma3ForConditionalGeneration": (
        {
            "vision_config": SIGLIP,
            "text_config": {
                "head_dim": 16,
                "num_hidden_layers": 3,
                "sliding_window": 12,
                "sliding_window_pattern": 3,
                "query_pre_attn_scalar": 24,
            },
        },
    ),
    "GlmForCausalLM": (
        {"head_dim": 24},
        {"head_dim": 16, "attention_bias": False, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    "Glm4ForCausalLM": (
        {"head_dim": 16},
        {
            "head_dim": 24,
            "attention_bias": False,
            "num_key_value_heads": 4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 900.0, "partial_rotary_factor": 1.0},
        },
    ),
    "Ernie4_5ForCausalLM": (
        {"head_dim": 24, "use_bias": True},
        {"head_dim": 16, "tie_word_embeddings": False, "num_key_value_heads": 1},
    ),
    "Cohere2ForCausalLM": (
        {"num_hidden_layers": 4, "sliding_window": 12, "logit_scale": 0.5},
        {
            "sliding_window": 30,
            "layer_types": ["full_attention", "sliding_attention"],
            "attention_bias": True,
            "tie_word_embeddings": False,
        },
    ),
    "GPT2LMHeadModel": (
        {},
        {
            "n_inner": 80,
            "activation_function": "relu",
            "tie_word_embeddings": False,
            "layer_norm_epsilon": 1e-3,
        },
    ),
    "GPTNeoXForCausalLM": (
        {},  # a quarter of each head is rotated
        {
            "use_parallel_residual": False,
            "hidden_act": "gelu_fast",
            "attention_bias": False,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0},
        },
    ),
    "FalconForCausalLM": (
        {},  # as 7B
        {"bias": True, "hidden_size": 96, "num_attention_heads": 6, "activation": "gelu_pytorch_tanh"},
        {"new_decoder_architecture": True, "num_kv_heads": 2},  # as 40B
        {
            "new_decoder_architecture": True,
            "num_ln_in_parallel_attn": 1,
            "num_kv_heads": 4,
            "ffn_hidden_size": 72,
            "tie_word_embeddings": False,
        },  # as 11B
        {"multi_query": False, "parallel_attn": False, "bias": True, "alibi": True},  # as RW
        {"alibi": True, "hidden_size": 96, "num_attention_heads": 6},
        {"multi_query": False, "parallel_attn": False},
    ),
    "MixtralForCausalLM": (
        {"num_local_experts": 4, "sliding_window": 11},
        {"num_local_experts": 3, "num_experts_per_tok": 1, "tie_word_embeddings": True, "head_dim": 24},
    ),
    "Qwen3MoeForCausalLM": (
        {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "norm_topk_prob": True},
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "num_hidden_layers": 4,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
            "attention_bias": True,
            "head_dim": 32,
        },
    ),
    "GptOssForCausalLM": (
        {
            "num_local_experts": 4,
            "head_dim": 16,
            "sliding_window": 9,
            "num_hidden_layers": 3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        {
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "head_dim": 32,
            "num_key_value_heads": 1,
            "sliding_window": 40,
            "layer_types": ["full_attention", "sliding_attention"],
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 4.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 32,
            },
        },
    ),
}
