"""Matcher: where one sample stands in its grammar, and which tokens may follow.

Owns the state of one sample, made from its tokens alone: it reads what its sequence has generated since it last
looked, so preemption, recompute and checkpoints need nothing of it, and no row can inherit anything from another.
A grammar begins with the answer: what is reasoned before it (`reasoning`) is free, and not read.
Knows no tensors (`token_masks`), no text and no cache (`grammars`).

Samples of one grammar share the automaton that the library builds as it goes, which spares each of them the work but
has a limit of size. So a sample that meets a limit is tried once more by itself: it fails only for its own sake.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from collections.abc import Sequence as Items
from functools import cache
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.grammar_source import shortened
from engine.reasoning import Part, Splitter, Stage, parts_of

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher

MAX_FILL_THREADS = 8


class Source(Protocol):
    """What a matcher needs of `grammars.Grammar`."""

    num_words: int

    def shared(self) -> LLMatcher: ...

    def alone(self) -> LLMatcher: ...


class Matcher:
    """`split`: makes the splitter of a sample that may reason, which the grammar lets it do before its answer; None:
    all is answer. `openers`: the tokens that begin a reasoning. `ends`: those that end a sample, which are kept from
    it until its answer. `error`: why the sample cannot go on; empty while it can."""

    __slots__ = (
        "_alone",
        "_ends",
        "_num_read",
        "_openers",
        "_source",
        "_split",
        "_splitter",
        "_state",
        "error",
    )

    def __init__(
        self,
        source: Source,
        split: Callable[[], Splitter | None] = lambda: None,
        openers: Items[int] = (),
        ends: Items[int] = (),
    ) -> None:
        self._source = source
        self._state = source.shared()
        self._split = split
        self._splitter = split()
        self._openers = openers
        self._ends = ends
        self._alone = False
        self._num_read = 0
        self.error = ""

    @property
    def is_bound(self) -> bool:
        """Whether the next token may be of the grammar: in a reasoning none is."""
        return self._splitter is None or self._splitter.stage is not Stage.BEFORE

    @property
    def num_words(self) -> int:
        """int32 words of a mask: one bit per token of the tokenizer or the model, whichever has more."""
        return self._source.num_words

    def follow(self, token_ids: Items[int], num_prompt: int) -> None:
        """Take in what was generated since the last call. `token_ids` is the prompt and what was generated; it only
        ever grows."""
        new = list(token_ids[num_prompt + self._num_read :])
        if self.error or not new:
            return
        self._num_read += len(new)
        answer = parts_of(new, self._splitter)[Part.ANSWER]
        if answer and not self._state.consume_tokens(answer):
            self._retry(token_ids[num_prompt:])

    def settle(self, token_ids: Items[int], num_prompt: int, mask: NDArray[np.int32]) -> None:
        """Look at the mask `[num_words]` that was just filled: fill it again, or set `error`, if it is no mask. Where
        a reasoning may begin its mark is allowed, and in it everything but the end."""
        if not self.is_bound and not self.error:
            mask[:] = -1
            for token_id in self._ends:
                mask[token_id >> 5] &= ~_bit(token_id)
            return
        if self._state.is_error() and not self.error:
            self._retry(token_ids[num_prompt:])
            if not self.error:
                _fill_one(self._state, mask)
                self._note()
        if not self.error and not mask.any():
            self.error = "no token of this model can follow"
        if self._splitter is not None and self._splitter.stage is Stage.UNDECIDED:
            for token_id in self._openers:
                mask[token_id >> 5] |= _bit(token_id)

    def _retry(self, generated: Items[int]) -> None:
        """Once more from the start, with an automaton of its own."""
        if not self._alone:
            self._alone = True
            self._state = self._source.alone()
            self._state.consume_tokens(parts_of(generated, self._split())[Part.ANSWER])
        self._note()

    def _note(self) -> None:
        if self._state.is_error():
            self.error = shortened(self._state.get_error())


def fill(samples: Items[tuple[Matcher, Items[int], int]], masks: NDArray[np.int32]) -> None:
    """samples: each with its tokens and how many of them are its prompt. masks `[at least len(samples), num_words]`:
    bit t of row i is set where token t may follow sample i. Sets `error` of those that cannot go on; their rows
    mean nothing.

    Runs on several threads, without the interpreter's lock.
    """
    for matcher, token_ids, num_prompt in samples:
        matcher.follow(token_ids, num_prompt)
    ready = [
        (matcher._state, i)
        for i, (matcher, _, _) in enumerate(samples)
        if matcher.is_bound and not matcher.error
    ]
    if len(ready) == 1:
        _fill_one(ready[0][0], masks[ready[0][1]])
    elif ready:
        _executor().unsafe_compute_mask_ptr(ready, masks.ctypes.data, masks.shape[1] * 4, len(masks))
    for i, (matcher, token_ids, num_prompt) in enumerate(samples):
        matcher.settle(token_ids, num_prompt, masks[i])


def _bit(token_id: int) -> np.int32:
    return np.uint32(1 << (token_id & 31)).view(np.int32)


def _fill_one(state: LLMatcher, mask: NDArray[np.int32]) -> None:
    state.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)


@cache
def _executor() -> LLExecutor:
    from llguidance import LLExecutor

    return LLExecutor(max(1, min(MAX_FILL_THREADS, os.cpu_count() or 1)))
