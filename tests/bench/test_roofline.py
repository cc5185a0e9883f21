"""The bounds of the benchmark of one GPU, against computations by hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from engine.model_config import MixtureOfExperts, ModelConfig
from tests.bench.gpu.roofline import Roofline, Row, ideal_steps
from tests.support.shapes import shape

# A vocabulary of 100, 2 layers of width 8 with 2 heads and 1 kv head of 4 channels, an MLP of width 16.
HEAD = 100 * 8
PRODUCTS = 2 * ((8 + 2 * 4) * 8 + 8 * 8 + 2 * 16 * 8 + 8 * 16)  # q, k, v; out; gate, up; down
NORMS = 2 * 2 * 8 + 8
KV_BYTES = 2 * 2 * 2 * 4  # K and V of a token: two layers, four channels, two bytes


def config(**more: Any) -> ModelConfig:
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1}
    return shape(vocab_size=100, eos_token_ids=(), head_dim=4, **sizes, **more)


def test_a_step_of_one_token() -> None:
    num_bytes, num_flops = Roofline(config(), 1.0, 1.0).cost([Row(1, 9, True)])
    assert num_bytes == 2 * (PRODUCTS + NORMS + HEAD + 8) + KV_BYTES * (10 + 1)
    assert num_flops == 2 * PRODUCTS + 2 * HEAD + 4 * 2 * 2 * 4 * 10


def test_layers_that_are_quantised_are_counted_as_they_are() -> None:
    plain, kept = (Roofline(config(), 1.0, 1.0, layer_bytes=n).cost([Row(1, 9, True)]) for n in (None, 77))
    assert plain.num_bytes - kept.num_bytes == 2 * (PRODUCTS + NORMS) - 77
    assert plain.num_flops == kept.num_flops


def test_a_step_of_a_chunk_and_a_token() -> None:
    # a chunk of 3 tokens behind 5 that draws nothing: its queries see 6, 7 and 8 tokens
    num_bytes, num_flops = Roofline(config(), 1.0, 1.0).cost([Row(3, 5, False), Row(1, 9, True)])
    assert num_bytes == 2 * (PRODUCTS + NORMS + HEAD + 4 * 8) + KV_BYTES * (8 + 10 + 4)
    assert num_flops == 2 * PRODUCTS * 4 + 2 * HEAD + 4 * 2 * 2 * 4 * (6 + 7 + 8 + 10)


def test_without_a_row_that_draws_the_head_is_not_read() -> None:
    with_head, without = (Roofline(config(), 1.0, 1.0).cost([Row(2, 0, draws)]) for draws in (True, False))
    assert with_head.num_bytes - without.num_bytes == 2 * HEAD
    assert with_head.num_flops - without.num_flops == 2 * HEAD


def test_a_tied_head_costs_what_an_own_one_does() -> None:
    own, tied = (
        Roofline(config(tied_embeddings=tied), 1.0, 1.0).cost([Row(1, 0, True)]) for tied in (False, True)
    )
    assert own == tied


def test_every_step_is_bound_by_itself() -> None:
    steps = [[Row(1, 9, True)], [Row(64, 0, True)]]
    costs = [Roofline(config(), 1.0, 1.0).cost(rows) for rows in steps]
    copy, product = 1e3, 7e3
    times = [(cost.num_bytes / copy, cost.num_flops / product) for cost in costs]
    assert times[0][0] > times[0][1]  # bytes decide the one, operations the other
    assert times[1][0] < times[1][1]
    assert Roofline(config(), copy, product).seconds(steps) == pytest.approx(times[0][0] + times[1][1])


def test_what_cannot_be_counted_is_refused() -> None:
    experts = MixtureOfExperts(num_experts=4, num_per_token=2, intermediate_size=8, normalised=True)
    with pytest.raises(ValueError, match="not counted"):
        Roofline(config(moe=experts), 1.0, 1.0)
    with pytest.raises(ValueError, match="not counted"):
        Roofline(config(windows=(None, 4)), 1.0, 1.0)


def flat(steps: Iterator[list[Row]]) -> list[list[tuple[int, int, bool]]]:
    return [[tuple(row) for row in rows] for rows in steps]


def test_ideal_steps() -> None:
    assert flat(ideal_steps([5, 4], [3, 2], chunk=6)) == [
        [(5, 0, True), (1, 0, False)],
        [(3, 1, True)],
        [(1, 5, True), (1, 4, True)],
        [(1, 6, True)],
    ]


def test_ideal_steps_compute_a_shared_prefix_once() -> None:
    assert flat(ideal_steps([6, 6], [1, 1], chunk=16, shared=4)) == [[(6, 0, True), (2, 4, True)]]
