"""Masks on logits: bit by bit what the grammar says, and no row knows who had its place before."""

from __future__ import annotations

import random

import pytest
import torch

from engine.checkpoint import Checkpoint
from engine.grammars import Grammars
from engine.plan import Row
from engine.request import Request, RequestId
from engine.sampler import FAILED, Sampler
from engine.sampling_params import SamplingParams, StructuredOutputsParams
from engine.sequence import Sequence
from engine.token_masks import TokenMasks
from engine.tokenizer import Tokenizer
from tests.support.shapes import shape
from tests.support.tiny import EOS_TOKEN_ID, VOCAB_SIZE, write_tiny_llama

VOCAB = VOCAB_SIZE + 7
CONFIG = shape(vocab_size=VOCAB, eos_token_ids=(EOS_TOKEN_ID,))
WISHES = [
    StructuredOutputsParams(regex="[a-z ]{2,30}"),
    StructuredOutputsParams(choice=("the night", "the press", "no")),
    StructuredOutputsParams(json={"type": "array", "items": {"type": "string"}}),
    StructuredOutputsParams(grammar='start: word ("," word)*\nword: /[0-9a-f]+/'),
    None,
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.open(Checkpoint.open(str(write_tiny_llama(tmp_path_factory.mktemp("tiny")))))


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, VOCAB, (EOS_TOKEN_ID,))


def row(
    grammars: Grammars,
    wish: StructuredOutputsParams | None,
    generated: list[int],
    seed: int = 1,
    logprobs: int | None = 2,
) -> Row:
    sampling = SamplingParams(seed=seed, structured_outputs=wish, logprobs=logprobs, max_tokens=99)
    sequence = Sequence(Request(id=RequestId("a", 1), prompt_token_ids=(5, 6), sampling=sampling), 0, 99)
    sequence.token_ids += generated
    if wish is not None:
        (sequence.matcher,) = grammars.matchers(wish, [()])
    return Row(sequence, sequence.num_pending)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_grammar_allows_keeps_its_logit(
    grammars: Grammars, tokenizer: Tokenizer, dtype: torch.dtype
) -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(1)).to(dtype)
    begun = tokenizer.encode_part("no")
    rows = [row(grammars, StructuredOutputsParams(choice=("no", "nox")), begun), row(grammars, None, begun)]
    rows.append(row(grammars, StructuredOutputsParams(choice=("no",)), begun))
    masked = logits.clone()
    TokenMasks().apply(masked, rows)
    assert torch.equal(masked[1], logits[1])
    for i, allowed in ((0, [*tokenizer.encode_part("x"), EOS_TOKEN_ID]), (2, [EOS_TOKEN_ID])):
        assert torch.equal(masked[i, allowed], logits[i, allowed])
        assert (masked[i] > float("-inf")).sum() == len(allowed)


def test_a_row_that_cannot_go_on_fails_and_no_other(grammars: Grammars, tokenizer: Tokenizer) -> None:
    """Logits that were not finite, though only where the mask hides it; tokens that the grammar does not allow."""
    logits = torch.zeros(4, VOCAB)
    logits[1, 300] = float("nan")
    choice = StructuredOutputsParams(choice=("a",))
    rows = [row(grammars, choice, tokenizer.encode_part(text), logprobs=None) for text in ("", "", "b", "a")]
    tokens = Sampler(CONFIG)(logits, rows).token_ids
    assert tokens == [*tokenizer.encode_part("a"), FAILED, FAILED, EOS_TOKEN_ID]
    errors = [one.sequence.matcher.error for one in rows if one.sequence.matcher is not None]
    assert [bool(error) for error in errors] == [False, False, True, False]


@pytest.mark.parametrize("num_steps", [60, pytest.param(1250, marks=pytest.mark.long)])
def test_a_reused_row_is_as_fresh(grammars: Grammars, num_steps: int) -> None:
    """Samples come and go in eight places of one sampler, some with a grammar: each gets what it gets alone, from a
    matcher that reads all its tokens at once."""
    rng, generator = random.Random(3), torch.Generator().manual_seed(3)
    places = Sampler(CONFIG)
    rows = [row(grammars, rng.choice(WISHES), [], seed) for seed in range(8)]
    ends = 0
    for step in range(num_steps):
        logits = torch.randn(8, VOCAB, generator=generator) * 3
        together = places(logits.clone(), rows)
        for i, one in enumerate(rows):
            s = one.sequence
            wish = s.request.sampling.structured_outputs
            fresh = row(grammars, wish, s.generated, s.seed)
            alone = Sampler(CONFIG)(logits[i : i + 1].clone(), [fresh])
            assert alone.token_ids == [together.token_ids[i]] != [FAILED]
            assert alone.logprobs[0] == together.logprobs[i]
            s.token_ids.append(together.token_ids[i])
            rows[i] = Row(s, s.num_pending)
            if together.token_ids[i] == EOS_TOKEN_ID or rng.random() < 0.1:
                ends += 1
                rows[i] = row(grammars, rng.choice(WISHES), [], seed=8 * step + i)
    assert ends > num_steps // 2


def test_masks_are_made_for_any_number_of_rows(grammars: Grammars) -> None:
    """More rows, then fewer, in one memory."""
    masks = TokenMasks()
    for count in (1, 9, 3, 20, 1):
        logits = torch.zeros(count, VOCAB)
        masks.apply(logits, [row(grammars, WISHES[1], []) for _ in range(count)])
        assert torch.equal(logits, logits[:1].expand(count, -1))
        assert 0 < (logits[0] == 0).sum() < 20
