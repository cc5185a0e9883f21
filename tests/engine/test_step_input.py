"""A plan becomes flat tensors: tokens, positions, slots, tables, and the rows that sample."""

from __future__ import annotations

from typing import Any

import pytest

from engine.plan import Plan, Row
from engine.request import TokenLogprobs
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from engine.step_input import StepInput
from tests.support.rollout import sequence

score = TokenLogprobs(token_id=5, logprob=-1.0)


def at(prompt: list[int], computed: int, pages: list[int], **sampling: Any) -> Sequence:
    item = sequence(prompt, SamplingParams(**{"seed": 0} | sampling))
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


def test_proposed_tokens_stand_behind_the_last_and_are_drawn_behind() -> None:
    guessed, decode = at(list(range(100, 116)), 15, [9, 4]), at([5, 6], 1, [2])
    plan = Plan((Row(guessed, 1, (7, 8)), Row(decode, 1)))
    step = StepInput.build(plan, 16)
    assert step.token_ids.tolist() == [115, 7, 8, 6]
    assert step.positions.tolist() == [15, 16, 17, 1]
    assert step.slots.tolist() == [9 * 16 + 15, 4 * 16, 4 * 16 + 1, 2 * 16 + 1]
    assert step.page_table.tolist() == [[9, 4], [2, 0]]
    assert step.query_start.tolist() == [0, 3, 4]
    assert step.context_lens.tolist() == [18, 2]
    assert step.logit_rows.tolist() == [0, 1, 2, 3]
    assert (plan.num_tokens, plan.num_draws) == (4, 4)


def test_padding_adds_tokens_that_store_nothing_and_belong_to_no_row() -> None:
    item = at([5, 6, 7], 0, [3])
    step = StepInput.build(Plan((Row(item, 3),)), 16, row_multiple=16)
    assert step.token_ids.shape == step.positions.shape == step.slots.shape == (16,)
    assert step.slots.tolist() == [48, 49, 50] + [-1] * 13
    assert step.query_start.tolist() == [0, 3]
    assert step.logit_rows.tolist() == [2] + [0] * 15


def test_positions_that_score_a_prompt_are_those_not_known_yet() -> None:
    asked = {"seed": 0, "prompt_logprobs": 0}
    quiet, fresh = at([5, 6, 7], 0, [3]), at([5, 6, 7, 8], 0, [1], **asked)
    again, done = at([5] * 9, 2, [2], **asked), at([5, 6, 7], 2, [4], **asked)
    again.prompt_logprobs = [score] * 5
    done.prompt_logprobs = [score] * 2
    rows = (Row(quiet, 3), Row(fresh, 4), Row(again, 5), Row(done, 1))
    assert [list(row.scored) for row in rows] == [[], [0, 1, 2], [5, 6], []]
    step = StepInput.build(Plan(rows), 16, row_multiple=8)
    assert step.scored_rows.tolist() == [3, 4, 5, 7 + 3, 7 + 4, 0, 0, 0]
    assert step.logit_rows.tolist() == [2, 6, 12, 0, 0, 0, 0, 0]
    assert StepInput.build(Plan(rows[:1]), 16, row_multiple=8).scored_rows.tolist() == []


def test_no_row_samples() -> None:
    step = StepInput.build(Plan((Row(at([5, 6, 7], 0, [3]), 2),)), 16, row_multiple=16)
    assert step.logit_rows.tolist() == []


def test_pages_of_any_size() -> None:
    item = at(list(range(70)), 30, [1, 0, 6])
    step = StepInput.build(Plan((Row(item, 40),)), 32)
    assert step.slots.tolist() == [32 + 30, 32 + 31, *range(32), *range(6 * 32, 6 * 32 + 6)]


@pytest.mark.parametrize("row_multiple", [1, 4])
def test_rows_of_one_token_are_what_they_are_among_others(row_multiple: int) -> None:
    """They are translated by a way of their own."""
    asked = at([5, 6, 7], 0, [3], prompt_logprobs=0)
    first, decode, edge = at([5, 6, 7], 0, [3]), at(list(range(40)), 39, [9, 4, 7]), at([1] * 17, 16, [2, 8])
    rows = (Row(first, 1), Row(decode, 1), Row(asked, 1), Row(edge, 1))
    alone = StepInput.build(Plan(rows), 16, row_multiple=row_multiple)
    among = StepInput.build(Plan((*rows, Row(at([8, 9], 0, [6]), 2))), 16, row_multiple=row_multiple)
    for name in ("token_ids", "positions", "slots", "page_table", "context_lens"):
        one, other = getattr(alone, name), getattr(among, name)
        assert one.tolist() == other[:4].tolist(), name
        assert one.dtype == other.dtype
    assert alone.query_start is None
    assert alone.logit_rows.tolist()[:2] == [1, 3]
    assert alone.scored_rows.tolist()[:1] == [2]


def test_one_row_is_padded_too() -> None:
    step = StepInput.build(Plan((Row(at([5, 6, 7], 2, [3]), 1),)), 16, row_multiple=16)
    assert step.query_start is not None
    assert step.query_start.tolist() == [0, 1]
    assert step.token_ids.tolist() == [7] + [0] * 15
    assert step.positions.tolist() == [2] + [0] * 15
    assert step.slots.tolist() == [50] + [-1] * 15
