"""The sampler against a plain one written from the definitions, and against the frequencies they promise."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.plan import Row
from engine.sampler import FAILED, Sampler
from engine.sampling_params import SamplingParams
from kernels import KernelSet, kernels_for
from kernels.noise import uniforms
from tests.support.hopping import triton_kernels
from tests.support.rollout import sequence
from tests.support.shapes import shape

VOCAB = 3000
CONFIG = shape(vocab_size=VOCAB, eos_token_ids=(2, 5))
SAMPLER = Sampler(CONFIG)


def row(seed: int = 0, prompt: int = 3, **params: Any) -> Row:
    return Row(sequence([1] * prompt, SamplingParams(seed=seed, **params)), prompt)


def draw(logits: Tensor, rows: list[Row], sampler: Sampler = SAMPLER) -> list[int]:
    return sampler(logits.clone(), rows).token_ids


def plain_draw(logits: list[float], params: SamplingParams, u: float) -> int:
    """Temperature, min-p, top-k, top-p, inverse CDF in the order of ids: lists and math.exp only."""
    top = max(logits)
    weights = {i: math.exp((x - top) / params.temperature) for i, x in enumerate(logits)}
    weights = {i: 0.0 if weight < params.min_p else weight for i, weight in weights.items()}
    kept = sorted(weights, key=lambda i: (weights[i] == 0.0, -logits[i], i))
    if params.top_k:
        kept = kept[: params.top_k]
    mass, before, nucleus = sum(weights[i] for i in kept), 0.0, []
    for i in kept:
        if nucleus and params.top_p < 1.0 and before >= params.top_p * mass:
            break
        nucleus.append(i)
        before += weights[i]
    kept = sorted(nucleus)
    target, total = u * sum(weights[i] for i in kept), 0.0
    for i in kept:
        total += weights[i]
        if total > target:
            return i
    return kept[-1]


FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"top_k": 1},
    {"top_k": 7, "temperature": 2.0},
    {"top_k": 50, "top_p": 0.8},
    {"top_p": 0.5},
    {"top_p": 0.999, "temperature": 2.0},  # a nucleus wider than the first candidates
    {"top_p": 1e-9},
    {"top_k": 2900, "top_p": 0.99, "temperature": 2.0},
    {"temperature": 1e-3},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"min_p": 0.2, "top_k": 30, "top_p": 0.7, "temperature": 1.5},
    {"min_p": 1e-4, "top_p": 0.999, "temperature": 2.0},
    {"temperature": 0.0},
]


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
@pytest.mark.parametrize("spread", [0.2, 3.0])
def test_equals_a_plain_implementation(spread: float, kernels: KernelSet) -> None:
    generator = torch.Generator().manual_seed(3)
    cases = [params for params in FILTERS for _ in range(12)]
    random.Random(4).shuffle(cases)
    logits = torch.randn(len(cases), VOCAB, generator=generator) * spread
    rows = [row(seed=i, prompt=1 + i % 5, **params) for i, params in enumerate(cases)]
    tokens = draw(logits, rows, Sampler(CONFIG, kernels_for("cpu", kernels)))
    for i, (found, one) in enumerate(zip(tokens, rows, strict=True)):
        values, params = logits[i].tolist(), one.sequence.request.sampling
        if params.greedy:
            assert found == values.index(max(values))
            continue
        u = uniforms([one.sequence.seed], [len(one.sequence.token_ids)])[0]
        assert found == plain_draw(values, params, float(u)), cases[i]


def test_the_triton_set_draws_the_same() -> None:
    """These rows: u is far enough from all edges of tokens for sums in fp32."""
    rows = [row(seed=i, **params) for i, params in enumerate(FILTERS)]
    logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(8)) * 3
    logits[2, 7] = float("nan")
    found = Sampler(CONFIG, triton_kernels())(logits.clone(), rows).token_ids
    assert found == draw(logits, rows)
    assert found.count(FAILED) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_crowd_changes_nothing_even_with_ties(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    rows = [row(seed=i, **params) for i, params in enumerate(FILTERS * 4)]
    logits = torch.randint(-3, 4, (len(rows), VOCAB), generator=generator).to(dtype)  # ties everywhere
    together = draw(logits, rows)
    for i in range(len(rows)):
        assert draw(logits[i : i + 1], rows[i : i + 1]) == [together[i]], FILTERS[i % len(FILTERS)]
    order = torch.randperm(len(rows), generator=generator).tolist()
    assert draw(logits[order], [rows[i] for i in order]) == [together[i] for i in order]


def test_greedy_takes_the_lowest_id_of_a_tie() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[1, [900, 17, 40]] = 1.0
    assert draw(logits, [row(temperature=0.0), row(temperature=0.0)]) == [0, 17]


@pytest.mark.parametrize("params", [{}, {"top_k": 4}, {"top_p": 0.9}, {"temperature": 0.5}, {"min_p": 0.15}])
def test_frequencies(params: dict[str, Any]) -> None:
    base = torch.full((VOCAB,), -40.0)
    base[:6] = torch.tensor([0.5, 0.3, 0.1, 0.06, 0.03, 0.01]).log()
    draws, counts = 4000, np.zeros(6)
    for start in range(0, draws, 500):
        rows = [row(seed=start + i, **params) for i in range(500)]
        for token in draw(base.repeat(500, 1), rows):
            counts[token] += 1
    weights = base[:6].double().numpy() / params.get("temperature", 1.0)
    expected = np.exp(weights)
    expected[params.get("top_k", 6) :] = 0
    expected[expected < expected[0] * params.get("min_p", 0)] = 0
    if "top_p" in params:
        expected[4:] = 0  # 0.5 + 0.3 + 0.1 = 0.9 is reached in exact arithmetic or one token later
        expected[3] = expected[3] if counts[3] else 0
    expected = expected / expected.sum() * draws
    assert (counts[expected == 0] == 0).all()
    seen = expected > 0
    chi_square = ((counts[seen] - expected[seen]) ** 2 / expected[seen]).sum()
    assert chi_square < 25  # 5 degrees of freedom at most: beyond 1e-4


def test_noise_is_uniform_and_depends_on_seed_and_position() -> None:
    u = uniforms([seed for seed in range(100) for _ in range(100)], list(range(100)) * 100)
    assert len(set(u.tolist())) == 10000
    assert 0 <= u.min() < u.max() < 1
    counts, _ = np.histogram(u, bins=20, range=(0, 1))
    assert ((counts - 500) ** 2 / 500).sum() < 60  # 19 degrees of freedom
    grid = u.reshape(100, 100)
    assert abs(np.corrcoef(grid[:-1].ravel(), grid[1:].ravel())[0, 1]) < 0.05
    assert abs(np.corrcoef(grid[:, :-1].ravel(), grid[:, 1:].ravel())[0, 1]) < 0.05
    assert uniforms([-(2**63), 2**63 - 1], [0, 2**31]).shape == (2,)


def test_non_finite_logits_fail_their_row_alone() -> None:
    logits = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(6))
    clean = draw(logits, [row(seed=i, temperature=float(i % 2), top_k=i) for i in range(6)])
    logits[1, 5], logits[2, 7], logits[4] = float("nan"), float("inf"), float("-inf")
    found = draw(logits, [row(seed=i, temperature=float(i % 2), top_k=i) for i in range(6)])
    assert [found[i] for i in (1, 2, 4)] == [FAILED] * 3
    assert [found[i] for i in (0, 3, 5)] == [clean[i] for i in (0, 3, 5)]


def test_min_tokens_masks_ends_until_enough_are_made() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [2, 5, 9]] = torch.tensor([3.0, 2.0, 1.0])
    waiting = row(temperature=0.0, min_tokens=1, max_tokens=4, stop_token_ids=(9, 10**6))
    assert draw(logits, [waiting]) == [0]
    only_stops = row(temperature=0.0, min_tokens=1, max_tokens=4, stop_token_ids=(9,), ignore_eos=True)
    assert draw(logits, [only_stops]) == [2]
    waiting.sequence.token_ids.append(0)
    assert draw(logits, [waiting]) == [2]
