"""Penalties, biases, allowed tokens and bad words: against plain lists, against transformers, and row by row."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.adjust import adjust
from engine.plan import Row
from engine.request import Request, RequestId
from engine.sampler import FAILED, Sampler
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from kernels.reference import penalise
from tests.support.shapes import shape

VOCAB = 61
CONFIG = shape(vocab_size=VOCAB, eos_token_ids=(2, 5))
Words = tuple[tuple[int, ...], ...]


def row(prompt: list[int], generated: list[int], bad_words: Words = (), **params: Any) -> Row:
    sampling = SamplingParams(**{"seed": 1, **params})
    request = Request(id=RequestId("a", 1), prompt_token_ids=tuple(prompt), sampling=sampling)
    sequence = Sequence(request, 0, 100, bad_words)
    sequence.token_ids += generated
    return Row(sequence, sequence.num_pending)


def adjusted(logits: Tensor, *rows: Row) -> Tensor:
    changed = logits.clone()
    adjust(changed, list(rows), penalise)
    return changed


def plain(logits: list[float], one: Row) -> list[float]:
    """The definitions, one token at a time; bad words give way when nothing else is left."""
    sequence, p = one.sequence, one.sequence.request.sampling
    generated, biases = sequence.generated, dict(p.biases)
    values = []
    for token_id, x in enumerate(logits):
        if p.allowed_token_ids is not None and token_id not in p.allowed_token_ids:
            x = float("-inf")
        x += biases.get(token_id, 0.0)
        if token_id in sequence.token_ids:
            x = x / p.repetition_penalty if x > 0 else x * p.repetition_penalty
        x -= p.frequency_penalty * generated.count(token_id)
        x -= p.presence_penalty * (token_id in generated)
        values.append(x)
    words = sequence.rules.bad_words if sequence.rules else ()
    begun = [word for word in words if generated[len(generated) - len(word) + 1 :] == list(word[:-1])]
    masked = list(values)
    for word in begun:
        masked[word[-1]] = float("-inf")
    return masked if max(masked) > float("-inf") else values


def random_row(rng: random.Random) -> Row:
    """A row that carries some of the rules, or none; few tokens, so that they repeat."""
    params: dict[str, Any] = {"temperature": rng.choice([0.0, 0.7, 1.5]), "seed": rng.randrange(2**63)}
    some = rng.sample(range(VOCAB), 5)
    if rng.random() < 0.3:
        params["repetition_penalty"] = rng.choice([0.5, 1.2, 2.0])
    if rng.random() < 0.3:
        params["presence_penalty"] = rng.uniform(-2, 2)
    if rng.random() < 0.3:
        params["frequency_penalty"] = rng.uniform(-2, 2)
    if rng.random() < 0.3:
        params["logit_bias"] = {token_id: rng.uniform(-100, 100) for token_id in some[: rng.randrange(1, 5)]}
    if rng.random() < 0.3:
        params["allowed_token_ids"] = some[: rng.randrange(1, 5)]
    if rng.random() < 0.3:
        params["min_p"] = rng.random()
    if rng.random() < 0.3:
        params["top_k"] = rng.randrange(1, VOCAB)
    if rng.random() < 0.3:
        params["logprobs"] = 2
    words: list[tuple[int, ...]] = []
    generated = rng.choices(some, k=rng.randrange(8))
    if rng.random() < 0.3:
        words = [(token_id,) for token_id in some[: rng.randrange(1, 5)]]
        words += [tuple(rng.choices(some, k=rng.randrange(2, 4))) for _ in range(6)]
    return row(rng.choices(some, k=rng.randrange(1, 6)), generated, tuple(dict.fromkeys(words)), **params)


def test_equals_the_definitions() -> None:
    rng = random.Random(1)
    rows = [random_row(rng) for _ in range(600)]
    logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(1)) * 4
    found = adjusted(logits, *rows)
    expected = torch.tensor([plain(logits[i].tolist(), one) for i, one in enumerate(rows)])
    assert torch.equal(found.isinf(), expected.isinf())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_equals_the_processors_of_transformers() -> None:
    from transformers import NoBadWordsLogitsProcessor, RepetitionPenaltyLogitsProcessor

    generator = torch.Generator().manual_seed(2)
    words = [[3], [7, 8], [8, 9, 10]]
    for number in range(50):
        logits = torch.randn(1, VOCAB, generator=generator) * 3
        generated = [[7], [8, 9], [5, 7], [9, 8]][number % 4]
        ids = torch.tensor([[1, 2, 2, *generated]])
        theirs = RepetitionPenaltyLogitsProcessor(1.3)(ids, logits.clone())
        theirs = NoBadWordsLogitsProcessor(words, eos_token_id=0)(ids, theirs)
        one = row([1, 2, 2], generated, tuple(map(tuple, words)), repetition_penalty=1.3)
        assert torch.equal(adjusted(logits, one), theirs)


@pytest.mark.parametrize("num_rows", [1000, pytest.param(10_000, marks=pytest.mark.long)])
def test_a_reused_row_is_as_fresh(num_rows: int) -> None:
    """Rows of random rules pass through eight places of one sampler: each gets what it gets alone."""
    rng, generator = random.Random(3), torch.Generator().manual_seed(3)
    places = Sampler(CONFIG)
    for _ in range(num_rows // 8):
        rows = [random_row(rng) for _ in range(8)]
        logits = torch.randn(8, VOCAB, generator=generator) * 3
        together = places(logits.clone(), rows)
        for i, one in enumerate(rows):
            s = one.sequence
            words = s.rules.bad_words if s.rules else ()
            fresh = Sequence(s.request, 0, 100, words)
            fresh.token_ids += s.generated
            alone = Sampler(CONFIG)(logits[i : i + 1].clone(), [Row(fresh, fresh.num_pending)])
            assert alone.token_ids == [together.token_ids[i]] != [FAILED]
            assert alone.logprobs.get(0) == together.logprobs.get(i)


def test_counts_follow_a_growing_sequence() -> None:
    logits = torch.zeros(1, VOCAB)
    one = row([4, 4], [], frequency_penalty=1.0, presence_penalty=0.5)
    for expected, token_id in ((0.0, 4), (-1.5, 4), (-2.5, 9), (-2.5, 4), (-3.5, 1)):
        assert adjusted(logits, one)[0, 4] == expected
        assert adjusted(logits, one)[0, 4] == expected  # asking twice counts nothing twice
        one.sequence.token_ids.append(token_id)


def test_a_row_whose_logits_were_not_finite_fails_whatever_hides_it() -> None:
    logits = torch.zeros(4, VOCAB)
    logits[1, 7] = float("nan")
    logits[2, 7] = float("inf")
    rows = [row([1], [], allowed_token_ids=[3, 4], temperature=0.0) for _ in range(4)]
    assert Sampler(CONFIG)(logits, rows).token_ids == [3, FAILED, FAILED, 3]


def test_a_batch_without_rules_is_not_touched() -> None:
    assert row([1, 2], [], temperature=0.3, top_k=4, min_p=0.1, logprobs=3).sequence.rules is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_penalties_are_not_rounded_to_the_logits_dtype(dtype: torch.dtype) -> None:
    logits = torch.zeros(2, VOCAB, dtype=dtype)
    logits[:, 5], logits[:, 6] = 8.0, 7.97
    near = row([1], [5], temperature=0.0, presence_penalty=float(logits[0, 5] - logits[0, 6]) + 1e-3)
    assert Sampler(CONFIG)(logits, [near, row([1], [5], temperature=0.0)]).token_ids == [6, 5]
