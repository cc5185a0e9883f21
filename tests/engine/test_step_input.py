"""A plan becomes flat tensors: tokens, positions, slots, tables, and the rows that sample."""

from __future__ import annotations

from engine.plan import Plan, Row
from engine.request import SamplingParams
from engine.sequence import Sequence
from engine.step_input import StepInput
from tests.support.rollout import sequence


def at(prompt: list[int], computed: int, pages: list[int]) -> Sequence:
    item = sequence(prompt, SamplingParams(seed=0))
    item.num_computed, item.pages = computed, pages
    return item


def test_mixed_rows() -> None:
    decode = at(list(range(100, 118)), 17, [9, 4])
    chunk = at(list(range(200, 240)), 14, [2, 7, 5])
    plan = Plan((Row(decode, 1), Row(chunk, 4)))
    step = StepInput.build(plan, 16)
    assert step.token_ids.tolist() == [117, 214, 215, 216, 217]
    assert step.positions.tolist() == [17, 14, 15, 16, 17]
    assert step.slots.tolist() == [4 * 16 + 1, 2 * 16 + 14, 2 * 16 + 15, 7 * 16, 7 * 16 + 1]
    assert step.page_table.tolist() == [[9, 4], [2, 7]]
    assert step.query_start.tolist() == [0, 1, 5]
    assert step.context_lens.tolist() == [18, 18]
    assert step.logit_rows.tolist() == [0]  # the chunk does not reach the end of its prompt


def test_padding_adds_tokens_that_store_nothing_and_belong_to_no_row() -> None:
    item = at([5, 6, 7], 0, [3])
    step = StepInput.build(Plan((Row(item, 3),)), 16, row_multiple=16)
    assert step.token_ids.shape == step.positions.shape == step.slots.shape == (16,)
    assert step.slots.tolist() == [48, 49, 50] + [-1] * 13
    assert step.query_start.tolist() == [0, 3]
    assert step.logit_rows.tolist() == [2] + [0] * 15


def test_no_row_samples() -> None:
    step = StepInput.build(Plan((Row(at([5, 6, 7], 0, [3]), 2),)), 16, row_multiple=16)
    assert step.logit_rows.tolist() == []


def test_pages_of_any_size() -> None:
    item = at(list(range(70)), 30, [1, 0, 6])
    step = StepInput.build(Plan((Row(item, 40),)), 32)
    assert step.slots.tolist() == [32 + 30, 32 + 31, *range(32), *range(6 * 32, 6 * 32 + 6)]
