"""Steps without the host whose rows have penalties or ask how likely their tokens were: the same bits as with it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.cache import KVCache
from engine.decode_steps import DecodeSteps
from engine.logit_rules import MOST_COUNTED
from engine.model import Decoder
from engine.multi_step import decodes_freely
from engine.plan import Draws, Row
from engine.request import TokenLogprobs
from engine.sampler import Sampler
from engine.sampling_params import SamplingParams
from kernels import KernelSet
from tests.engine.test_shared_steps import PAGE, prepared
from tests.support.rollout import sequence
from tests.support.tiny import write_tiny_llama

Told = list[list[TokenLogprobs | int]]  # by row and step; a token id where nobody asks for more
ASKED: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0, "repetition_penalty": 1.5},
    {"temperature": 0.0, "frequency_penalty": -2.0, "presence_penalty": -2.0, "logprobs": 0},  # says it again
    {"temperature": 1.0, "logprobs": 0},
    {"temperature": 0.0},
    {
        "temperature": 0.9,
        "top_k": 5,
        "presence_penalty": 2.0,
        "frequency_penalty": 1.0,
        "repetition_penalty": 0.7,
    },
    {"temperature": 0.0, "presence_penalty": 1.0, "logprobs": 0},
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model"), num_layers=1, max_position=1024)


def rows_of(*asked: dict[str, Any]) -> tuple[Row, ...]:
    """Rows that compute their last token, each with pages of its own. Most have said half of the vocabulary; those
    that are to repeat themselves nothing, so that what they draw here is what counts."""
    made = []
    for number, params in enumerate(asked):
        prompt = [(7 * number + 3 * token) % 300 + 3 for token in range(30)]
        one = sequence(prompt, SamplingParams(seed=number, max_tokens=200, **params), number)
        said = 0 if params.get("presence_penalty", 0.0) < 0 else 130 + number
        one.token_ids += [(11 * number + token * token) % 300 + 3 for token in range(said)]
        one.num_computed = len(one.token_ids) - 1
        one.pages = [12 * number + page for page in range(12)]
        assert decodes_freely(one)
        made.append(Row(one, 1))
    return tuple(made)


def steps_of(decoder: Decoder, cache: KVCache) -> DecodeSteps:
    return DecodeSteps(
        decoder, cache, page_size=PAGE, most_rows=8, most_pages=64, most_steps=4, row_multiple=1
    )


def one_by_one(decoder: Decoder, steps: DecodeSteps, rows: tuple[Row, ...], count: int) -> Told:
    sampler, told = Sampler(decoder.config, decoder.kernels), Told([] for _ in rows)
    for _ in range(count):
        draws = sampler(steps.logits(rows).clone(), list(rows))
        for number, (row, token_id) in enumerate(zip(rows, draws.token_ids, strict=True)):
            told[number].append(draws.logprobs.get(number, token_id))
            row.sequence.token_ids.append(token_id)
            row.sequence.num_computed += 1
    return told


def together(steps: DecodeSteps, rows: tuple[Row, ...], *counts: int) -> Told:
    """In launches of so many steps, each behind the one before it."""
    told, behind = Told([] for _ in rows), 0
    for count in counts:
        drawn = steps.launch(rows, count, behind=behind)
        draws = Draws.of_steps(rows, drawn.tokens(), drawn.logprobs())
        for number, token_id in enumerate(draws.token_ids):
            tokens = (token_id, *draws.further[number])
            likely = (draws.logprobs.get(number), *draws.further_logprobs.get(number, ()))
            told[number] += [one or token for token, one in itertools.zip_longest(tokens, likely)]
        behind = count
    return told


@pytest.mark.parametrize(
    ("kernels", "asked", "counts"),
    [
        ("reference", ASKED, (4, 3)),
        ("cpu", ASKED, (4, 3)),
        ("triton", (ASKED[0], ASKED[1], ASKED[5]), (2, 1)),
        pytest.param("triton", ASKED, (3, 2), marks=pytest.mark.interpreted),
    ],
)
def test_the_bits_of_steps_with_the_host(
    model: Path, kernels: KernelSet, asked: tuple[dict[str, Any], ...], counts: tuple[int, ...]
) -> None:
    decoder, cache = prepared(model, kernels)
    steps = steps_of(decoder, cache)
    with torch.inference_mode():
        found = together(steps, rows_of(*asked), *counts)
        assert found == one_by_one(decoder, steps, rows_of(*asked), sum(counts))


def test_penalties_change_what_rows_say(model: Path) -> None:
    decoder, cache = prepared(model, "reference")
    with torch.inference_mode():
        steps = steps_of(decoder, cache)
        found = together(steps, rows_of(*ASKED), 4, 3)
        plain = together(steps, rows_of(*({**one, **NONE} for one in ASKED)), 4, 3)
    assert [row for row in range(len(ASKED)) if found[row] != plain[row]] == [0, 1, 4, 5]


NONE = {"repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0}


def test_places_are_taken_by_others(model: Path) -> None:
    """Rows inherit nothing from those that had their places before, with penalties or without."""
    decoder, cache = prepared(model, "reference")
    used = steps_of(decoder, cache)
    with torch.inference_mode():
        for asked in (
            ASKED,
            ASKED[3:],
            ASKED[::-1],
            (ASKED[3], ASKED[2]),
            ASKED[1:],
            ({}, {}, {}, *ASKED[:3]),
        ):
            found = together(used, rows_of(*asked), 4, 3)
            assert found == together(steps_of(decoder, cache), rows_of(*asked), 4, 3)


def test_long_sequences_are_counted_by_the_host() -> None:
    one = sequence([5] * MOST_COUNTED, SamplingParams(seed=1, max_tokens=9, presence_penalty=1.0))
    assert decodes_freely(one)
    one.token_ids.append(5)
    assert not decodes_freely(one)
