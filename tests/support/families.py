"""Tiny models of every family, written by transformers itself, with what transformers makes of a few prompts.

Owns the list of models, one row per kind of a family, their weights, the answers that ours must equal, and the
comparison. Knows nothing of where and by which kernels our engine runs: whoever asks says so.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor

from engine.checkpoint import Checkpoint
from engine.config import EngineConfig
from engine.engine import Engine
from engine.request import Completion, Request, RequestId
from engine.sampling_params import SamplingParams
from tests.support.pressure import run_arriving
from tests.support.theirs import continued
from tests.support.tiny import SIZES, VOCAB_SIZE, write_tokenizer

NUM_PAGES = 11  # the longest alone needs 9
PAGE_SIZE = 16
LENGTHS = (1, 16, 29, 47, 70)
MAX_TOKENS = 64
TOP = 3
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.5, 1.5, 1.7, 2.0, 2.5],
    "long_factor": [1.0, 1.5, 2.5, 4.0, 5.0, 8.0, 16.0, 20.0],
}
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
    "Olmo2ForCausalLM": (
        {"num_attention_heads": 6, "hidden_size": 96, "tie_word_embeddings": True},
        {"attention_bias": True, "num_key_value_heads": 4, "head_dim": 24},
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


class Case(NamedTuple):
    prompt: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: Tensor  # [prompt + MAX_TOKENS - 1, vocab]: of each token but the first


def write_tiny(folder: Path, architecture: str, changes: dict[str, Any]) -> Any:
    """A random model in transformers' own files, and the model itself."""
    model_class = getattr(transformers, architecture)
    torch.manual_seed(1)
    model = model_class(model_class.config_class(**{**SIZES, **changes})).float().eval()
    # an MLP without gates pushes all tokens to one side: there the products weigh more and the biases less
    gated = any("gate" in name for name, _ in model.named_parameters())
    spread, bias = (1.5, 0.3) if gated else (3.0, 0.1)
    with torch.inference_mode():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and name.endswith(".weight"):  # a norm
                parameter.normal_(float(parameter.mean()), 0.2)  # around 1, or 0 where 1 is added
            elif name.endswith("gate_up_proj_bias"):  # gates that are clamped meet their limit
                parameter.normal_(0.0, 3.0)
            elif name.endswith("bias"):
                parameter.normal_(0.0, bias)
            elif name.endswith("sinks"):  # some take most of the weight, others next to none
                parameter.normal_(0.0, 2.0)
            elif any(part in name for part in ("embed", "wte", "wpe")):
                multiplied = getattr(model.get_input_embeddings(), "scalar_embed_scale", 1.0)
                parameter.normal_(0.0, 0.3 / multiplied)
            else:  # wide enough that attention is peaked and greedy tokens vary
                parameter.normal_(0.0, spread * parameter.shape[1] ** -0.5)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return model


def reference_case(model: Any, length: int, rng: random.Random) -> Case:
    prompt = tuple(rng.randrange(3, VOCAB_SIZE) for _ in range(length))
    whole = continued(model, prompt, MAX_TOKENS)
    with torch.inference_mode():
        logprobs = model(whole).logits[0, :-1].log_softmax(dim=-1)
    return Case(prompt, tuple(whole[0, length:].tolist()), logprobs)


def reference_cases(folder: Path, architecture: str, number: int) -> list[Case]:
    """Model `number` of the family, written into the folder, and its answers to prompts of all `LENGTHS`."""
    torch.set_num_threads(1)
    changes = MODELS[architecture][number]
    model = write_tiny(folder, architecture, changes)
    model.set_attn_implementation("eager")  # others leave out the softcap of Gemma 2, in transformers 5.17
    rng = random.Random(7)
    original = changes.get("original_max_position_embeddings", 0)
    # transformers takes other frequencies once a sequence has grown beyond the original context; ours stay
    least = original + 1 if original < model.config.max_position_embeddings else 1
    cases = [reference_case(model, max(length, least), rng) for length in LENGTHS]
    assert len({token for case in cases for token in case.token_ids}) > 20  # else anything would match
    return cases


def assert_equal(cases: list[Case], completions: list[Completion], tolerance: float = 1e-4) -> None:
    for case, completion in zip(cases, completions, strict=True):
        (output,) = completion.outputs
        assert output.token_ids == case.token_ids
        assert output.logprobs is not None
        assert completion.prompt_logprobs is not None
        first, *scored = completion.prompt_logprobs
        assert first is None
        assert tuple(one.token_id for one in scored if one is not None) == case.prompt[1:]
        for one, expected in zip((*scored, *output.logprobs), case.logprobs, strict=True):
            assert one is not None
            assert one.logprob == pytest.approx(expected[one.token_id].item(), abs=tolerance)
            likeliest = expected.topk(TOP).values.tolist()
            assert [value for _, value in one.top] == pytest.approx(likeliest, abs=tolerance)
            assert [expected[token].item() for token, _ in one.top] == pytest.approx(likeliest, abs=tolerance)


def assert_near(cases: list[Case], completions: list[Completion], tolerance: float) -> None:
    """As `assert_equal`, of what was generated; but where two tokens are equally likely within the tolerance, either
    may follow, and nothing behind it is compared."""
    for case, completion in zip(cases, completions, strict=True):
        (output,) = completion.outputs
        assert output.logprobs is not None
        assert len(output.token_ids) == MAX_TOKENS
        rows = zip(case.token_ids, output.logprobs, case.logprobs[len(case.prompt) - 1 :], strict=True)
        for wanted, one, expected in rows:
            assert one.logprob == pytest.approx(expected[one.token_id].item(), abs=tolerance)
            assert one.logprob == pytest.approx(expected[wanted].item(), abs=2 * tolerance)
            if one.token_id != wanted:
                break


def generated(
    folder: Path, prompts: list[tuple[int, ...]], chunk: int, *, device: str = "cpu", **settings: Any
) -> list[Completion]:
    """Our greedy answers in fp32, from an engine that has too little memory for all of them."""
    page_bytes = Checkpoint.open(str(folder)).config.kv_bytes_per_token(4) * PAGE_SIZE
    engine = Engine.load(
        EngineConfig(
            model=str(folder),
            dtype="float32",
            device=device,
            page_size=PAGE_SIZE,
            threads=1,
            kv_cache_memory_bytes=NUM_PAGES * page_bytes,
            max_num_batched_tokens=chunk,
            **settings,
        )
    )
    assert engine.pool.num_pages == NUM_PAGES
    sampling = SamplingParams(
        temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True, seed=1, logprobs=TOP, prompt_logprobs=TOP
    )
    requests = [
        Request(id=RequestId(str(number), 1), prompt_token_ids=prompt, sampling=sampling)
        for number, prompt in enumerate(prompts)
    ]
    done = run_arriving(engine, requests, seed=chunk)
    assert engine.stats()["num_preemptions"] > 3
    return [done[request.id] for request in requests]
