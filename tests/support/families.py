"""Tiny models of every family, written by transformers itself, with what transformers makes of a few prompts.

Owns their weights, the answers that ours must equal, and the comparison; which models there are stands in
`family_models`. Knows nothing of where and by which kernels our engine runs: whoever asks says so.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
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
from tests.support.family_models import MODELS
from tests.support.pressure import run_arriving
from tests.support.theirs import continued
from tests.support.tiny import SIZES, VOCAB_SIZE, write_tokenizer

NUM_PAGES = 11  # the longest alone needs 9
PAGE_SIZE = 16
LENGTHS = (1, 16, 29, 47, 70)
MAX_TOKENS = 64
TOP = 3


class Peer(NamedTuple):
    """transformers' model, and what both are asked."""

    model: Any
    prompts: list[tuple[int, ...]]


class Case(NamedTuple):
    """What `generate` of transformers made of a prompt."""

    prompt: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: Tensor  # [prompt + MAX_TOKENS - 1, vocab]: of each token but the first


def write_tiny(folder: Path, architecture: str, changes: dict[str, Any]) -> Any:
    """A random model in transformers' own files, and the model itself."""
    model_class = getattr(transformers, architecture)
    torch.manual_seed(1)
    if "text_config" in changes:  # of a model that sees as well
        whole = {**changes, "text_config": {**SIZES, **changes["text_config"]}}
    else:
        whole = {**SIZES, **changes}
    model = model_class(model_class.config_class(**whole)).float().eval()
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


def prompts_of(lengths: Sequence[int]) -> list[tuple[int, ...]]:
    rng = random.Random(7)
    return [tuple(rng.randrange(3, VOCAB_SIZE) for _ in range(length)) for length in lengths]


def peer_of(folder: Path, architecture: str, number: int) -> Peer:
    """Model `number` of the family, written into the folder, and prompts of all `LENGTHS`."""
    torch.set_num_threads(1)
    changes = MODELS[architecture][number]
    model = write_tiny(folder, architecture, changes)
    model.set_attn_implementation("eager")  # others leave out the softcap of Gemma 2, in transformers 5.17
    original = changes.get("original_max_position_embeddings", 0)
    # transformers takes other frequencies once a sequence has grown beyond the original context; ours stay
    least = original + 1 if original < model.config.get_text_config().max_position_embeddings else 1
    return Peer(model, prompts_of([max(length, least) for length in LENGTHS]))


def scored(model: Any, whole: Tensor) -> Tensor:
    """Logprobs of each token but the first: `[length - 1, vocab]` of `[1, length]`."""
    with torch.inference_mode():
        logprobs: Tensor = model(whole).logits[0, :-1].log_softmax(dim=-1)
    return logprobs


def reference_cases(folder: Path, architecture: str, number: int) -> list[Case]:
    """The answers of `generate` to the prompts of `peer_of`: where ours may come out another way."""
    model, prompts = peer_of(folder, architecture, number)
    cases = []
    for prompt in prompts:
        whole = continued(model, prompt, MAX_TOKENS)
        cases.append(Case(prompt, tuple(whole[0, len(prompt) :].tolist()), scored(model, whole)))
    assert_varied([case.token_ids for case in cases])
    return cases


def assert_varied(answers: Sequence[tuple[int, ...]]) -> None:
    assert len({token for token_ids in answers for token in token_ids}) > 20  # else anything would match


def assert_equal(peer: Peer, completions: list[Completion], tolerance: float = 1e-4) -> None:
    """Every token of ours is the one that transformers finds likeliest behind those before it, so all of them are its
    own greedy answer, which `generate` would take a step for each to make."""
    for prompt, completion in zip(peer.prompts, completions, strict=True):
        (output,) = completion.outputs
        assert len(output.token_ids) == MAX_TOKENS
        logprobs = scored(peer.model, torch.tensor([prompt + output.token_ids]))
        assert output.token_ids == tuple(logprobs[len(prompt) - 1 :].argmax(dim=-1).tolist())
        assert output.logprobs is not None
        assert completion.prompt_logprobs is not None
        first, *ours = completion.prompt_logprobs
        assert first is None
        assert tuple(one.token_id for one in ours if one is not None) == prompt[1:]
        for one, expected in zip((*ours, *output.logprobs), logprobs, strict=True):
            assert one is not None
            assert one.logprob == pytest.approx(expected[one.token_id].item(), abs=tolerance)
            likeliest = expected.topk(TOP).values.tolist()
            assert [value for _, value in one.top] == pytest.approx(likeliest, abs=tolerance)
            assert [expected[token].item() for token, _ in one.top] == pytest.approx(likeliest, abs=tolerance)
    assert_varied([completion.outputs[0].token_ids for completion in completions])


def assert_near(cases: list[Case], completions: list[Completion], tolerance: float) -> None:
    """Near to what `generate` made, and where two tokens are equally likely within the tolerance, either
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
