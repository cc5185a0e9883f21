"""In models of other blocks than Llama's, too, a request's tokens and logprobs depend on itself alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine.test_alone_equals_crowd import comparable, interrupted, load, make_requests, one_by_one
from tests.support.families import write_tiny
from tests.support.pressure import run
from tests.support.tiny import EOS_TOKEN_ID

MODELS: dict[str, dict[str, Any]] = {
    "Qwen3MoeForCausalLM": {
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
        "norm_topk_prob": True,
    },
    "GptOssForCausalLM": {
        "num_local_experts": 6,
        "num_experts_per_tok": 3,
        "head_dim": 16,
        "sliding_window": 20,
    },
    "GPT2LMHeadModel": {},
    "FalconForCausalLM": {"alibi": True},
}


@pytest.mark.parametrize("architecture", MODELS)
def test_alone_and_in_a_crowd_they_are_the_same(tmp_path: Path, architecture: str) -> None:
    write_tiny(tmp_path, architecture, MODELS[architecture] | {"eos_token_id": EOS_TOKEN_ID})
    requests = make_requests(12)
    single = one_by_one(load(tmp_path, 64, threads=1, enable_prefix_caching=False), requests)
    assert len({completion.outputs[0].token_ids for completion in single.values()}) > 10
    crowded = load(tmp_path, 16, threads=1)
    assert comparable(run(crowded, requests, preempting=True)) == single
    assert crowded.stats()["num_preemptions"] > 0
    assert interrupted(crowded, load(tmp_path, 64, threads=1), requests, seed=4) == single
