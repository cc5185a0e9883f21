"""The contract of penalties: every set, against plain lists, and all sets in every bit."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from kernels import FAILED, Kernels, Penalties, reference

NAN, INF = float("nan"), float("inf")
VOCAB = 3001


def lists(seen: list[dict[int, int]], room: int, seed: int = 0) -> Penalties:
    """Of each row its tokens and how often each was generated; behind them whatever is not to be read."""
    rng, rows = random.Random(seed), len(seen)
    token_ids = torch.full((rows, room + 3), -(2**31), dtype=torch.int32)[:, :room]
    times = torch.full((rows, room + 3), 2**31 - 1, dtype=torch.int32)[:, :room]
    for row, of_row in enumerate(seen):
        token_ids[row, : len(of_row)] = torch.tensor(list(of_row), dtype=torch.int32)
        times[row, : len(of_row)] = torch.tensor(list(of_row.values()), dtype=torch.int32)
    repetition, frequency, presence = (
        torch.tensor([rng.uniform(low, high) for _ in seen]) for low, high in ((0.1, 3), (-2, 2), (-2, 2))
    )
    lengths = torch.tensor([len(of_row) for of_row in seen], dtype=torch.int32)
    return Penalties(token_ids, times, lengths, repetition, frequency, presence)


def random_rows(*sizes: int) -> list[dict[int, int]]:
    rng = random.Random(4)
    return [{token: rng.randrange(5) for token in rng.sample(range(VOCAB), size)} for size in sizes]


def copied(penalties: Penalties) -> Penalties:
    return Penalties(*(getattr(penalties, one.name).clone() for one in fields(Penalties)))


def counted(penalties: Penalties, row: int) -> dict[int, int]:
    length = int(penalties.lengths[row])
    ids, times = penalties.token_ids[row, :length].tolist(), penalties.times[row, :length].tolist()
    assert len(set(ids)) == length
    return dict(zip(ids, times, strict=True))


def penalised(kernels: Kernels, logits: Tensor, penalties: Penalties) -> Tensor:
    changed = logits.clone(memory_format=torch.preserve_format)
    kernels.penalise(changed, penalties)
    return changed


@pytest.mark.parametrize("room", [40, 1300])
def test_listed_tokens_and_no_others(kernels: Kernels, room: int) -> None:
    seen = random_rows(room, 0, 1, 30)
    penalties = lists(seen, room)
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(1)) * 5
    found = penalised(kernels, logits, penalties)
    assert torch.equal(found, penalised(reference.KERNELS, logits, penalties))
    for row, of_row in enumerate(seen):
        rest = [token for token in range(VOCAB) if token not in of_row]
        assert torch.equal(found[row, rest], logits[row, rest])
        repetition, frequency, presence = (
            float(one[row]) for one in (penalties.repetition, penalties.frequency, penalties.presence)
        )
        for token, times in of_row.items():
            x = float(logits[row, token])
            x = x / repetition if x > 0 else x * repetition
            x -= frequency * times + presence * (times > 0)
            assert float(found[row, token]) == pytest.approx(x, rel=1e-5, abs=1e-5)


def test_what_is_not_finite_stays_so(kernels: Kernels) -> None:
    penalties = lists([{5: 1, 6: 0, 7: 2}] * 2, 8)
    logits = torch.ones(2, 9)
    logits[0, [5, 6, 7]] = torch.tensor([NAN, INF, -INF])
    found = penalised(kernels, logits, penalties)[0, 5:8].tolist()
    assert found[0] != found[0]
    assert found[1:] == [INF, -INF]


def test_tokens_are_counted(kernels: Kernels) -> None:
    """Known ones, new ones, none where a row has failed or has no penalties, and none for which there is no room."""
    penalties = lists([{4: 0, 9: 2}, {}, {1: 1}, {7: 0}, {8: 3, 2: 0}], 4)
    drawn = [[9, 1, FAILED, 5, 3], [4, 1, 1, 5, 1], [0, 1, 6, 7, 0], [9, 2, 1, 5, 2], [0, 1, 6, 8, 0]]
    for step in drawn:
        kernels.count_tokens(penalties, torch.tensor(step))
    wanted = [{4: 1, 9: 4, 0: 2}, {}, {1: 3, 6: 2}, {7: 1, 5: 3, 8: 1}, {8: 3, 2: 1, 3: 1, 1: 1}]
    assert [counted(penalties, row) for row in range(5)] == wanted


def test_a_long_list(kernels: Kernels) -> None:
    """Of several blocks, counted like a plain list; strides change nothing."""
    rng = random.Random(6)
    seen = random_rows(1020, 2100)
    penalties = lists(seen, 2200)
    plain = copied(penalties)
    counts = [Counter(of_row) for of_row in seen]
    for _ in range(8):
        step = [rng.choice(list(of_row)) if rng.random() < 0.5 else rng.randrange(VOCAB) for of_row in counts]
        for count, token in zip(counts, step, strict=True):
            count[token] += 1
        for one in (penalties, plain):
            kernels.count_tokens(one, torch.tensor(step))
    for one in (penalties, plain):
        assert [counted(one, row) for row in range(2)] == [dict(count) for count in counts]


def test_no_rows_and_no_entries(kernels: Kernels) -> None:
    logits, penalties = torch.randn(2, 9), lists([{}, {}], 3)
    assert torch.equal(penalised(kernels, logits, penalties), logits)
    kernels.count_tokens(penalties, torch.tensor([1, 2]))
    assert penalties.lengths.tolist() == [0, 0]
    none = lists([], 3)
    kernels.penalise(logits[:0], none)
    kernels.count_tokens(none, torch.empty(0, dtype=torch.int64))


def test_a_view_of_a_wider_matrix(kernels: Kernels) -> None:
    one, off = torch.ones(2), torch.zeros(2)
    penalties = replace(lists([{1: 1}, {2: 3}], 4), repetition=one, frequency=one, presence=off)
    wide = torch.zeros(2, 20)
    kernels.penalise(wide[:, 5:9], penalties)
    assert wide.nonzero().tolist() == [[0, 6], [1, 7]]
    assert wide[:, 5:9].amin(dim=1).tolist() == [-1.0, -3.0]
