"""How families name and lay out their tensors where that is not Llama's way, one `Storage` each.

Owns these tables. Knows no config.json (`family_fields`) and no files: an entry of `families.FAMILIES` takes one, and
`placement` goes by it.
"""

from __future__ import annotations

from engine.model_config import Storage

GPT2_STORAGE = Storage(
    names=(
        (r"^transformer\.", ""),  # some repositories leave it out
        (r"^wte\.", "model.embed_tokens."),
        (r"^wpe\.", "model.embed_positions."),
        (r"^ln_f\.", "model.norm."),
        (r"^h\.", "model.layers."),
        (r"\.ln_1\.", ".input_layernorm."),
        (r"\.ln_2\.", ".post_attention_layernorm."),
        (r"\.attn\.c_attn\.", ".self_attn.qkv_proj."),
        (r"\.attn\.c_proj\.", ".self_attn.o_proj."),
        (r"\.mlp\.c_fc\.", ".mlp.up_proj."),
        (r"\.mlp\.c_proj\.", ".mlp.down_proj."),
    ),
    derived=r"\.attn\.(masked_)?bias$",  # the causal mask
    qkv="stacked",
    transposed=True,
)
NEOX_STORAGE = Storage(
    names=(
        (r"^gpt_neox\.embed_in\.", "model.embed_tokens."),
        (r"^gpt_neox\.final_layer_norm\.", "model.norm."),
        (r"^gpt_neox\.", "model."),
        (r"^embed_out\.", "lm_head."),
        (r"\.attention\.query_key_value\.", ".self_attn.qkv_proj."),
        (r"\.attention\.dense\.", ".self_attn.o_proj."),
        (r"\.mlp\.dense_h_to_4h\.", ".mlp.up_proj."),
        (r"\.mlp\.dense_4h_to_h\.", ".mlp.down_proj."),
    ),
    derived=r"\.attention\.(masked_)?bias$",
    qkv="grouped",
)
FALCON_STORAGE = Storage(
    names=(
        (r"^transformer\.word_embeddings\.", "model.embed_tokens."),
        (r"^transformer\.ln_f\.", "model.norm."),
        (r"^transformer\.h\.", "model.layers."),
        (r"\.ln_attn\.", ".input_layernorm."),
        (r"\.ln_mlp\.", ".post_attention_layernorm."),
        (r"\.self_attention\.query_key_value\.", ".self_attn.qkv_proj."),
        (r"\.self_attention\.dense\.", ".self_attn.o_proj."),
        (r"\.mlp\.dense_h_to_4h\.", ".mlp.up_proj."),
        (r"\.mlp\.dense_4h_to_h\.", ".mlp.down_proj."),
    ),
    qkv="grouped",
)
MIXTRAL_STORAGE = Storage(
    names=(
        (r"\.block_sparse_moe\.", ".mlp."),
        (r"\.experts\.(\d+)\.w1\.", r".experts.\1.gate_proj."),
        (r"\.experts\.(\d+)\.w2\.", r".experts.\1.down_proj."),
        (r"\.experts\.(\d+)\.w3\.", r".experts.\1.up_proj."),
    ),
)
GPT_OSS_STORAGE = Storage(names=((r"\.mlp\.router\.", ".mlp.gate."),), experts="alternating")
GLM_STORAGE = Storage(rotary="pairs", gate_up="stacked")
GLM4_STORAGE = Storage(
    names=(
        (r"\.post_attention_layernorm\.", ".pre_feedforward_layernorm."),
        (r"\.post_self_attn_layernorm\.", ".post_attention_layernorm."),
        (r"\.post_mlp_layernorm\.", ".post_feedforward_layernorm."),
    ),
    rotary="pairs",
    gate_up="stacked",
)
