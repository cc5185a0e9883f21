"""StopChecker: finds a request's stop strings in the text of one sample while it grows.

Owns the text tail and the cut. Looks only at new text plus as many old characters as a stop string may reach
back, so a token costs the same at any length. Of a sample that reasons it sees the answer alone (`reasoning`): what
a model thinks is no place to stop at. Knows neither scheduler nor sampler; only sequences that have stop strings have
one of these.
"""

from __future__ import annotations

from typing import NamedTuple

from engine.detokenizer import Detokenizer
from engine.reasoning import Part, Splitter
from engine.tokenizer import Tokenizer


class StopMatch(NamedTuple):
    """`num_tokens`: generated tokens up to the one that completed the stop string; `text_cut`: characters
    of the answer's text before it."""

    stop: str
    num_tokens: int
    text_cut: int


class StopChecker:
    """`stop` strings are honoured once `min_tokens` tokens exist. A match must end in a token from there on.
    `splitter`: of this sample, at its start; None: all is answer."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: tuple[str, ...],
        min_tokens: int = 0,
        splitter: Splitter | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._splitter = splitter
        self._stop = stop
        self._min_tokens = min_tokens
        self._reach = max(map(len, stop)) - 1
        self._detokenizer = Detokenizer(tokenizer)
        self._num_tokens = 0  # pushed
        self._token_ids: list[int] = []  # of the answer
        self._ends: list[int] = []  # of each of them: tokens pushed up to it, itself included
        self._tail = ""
        self._tail_start = 0  # characters of text before the tail

    def push(self, token_id: int, *, last: bool = False) -> StopMatch | None:
        """Take one generated token. `last`: no further token comes, so text held back for the rest of a
        character is looked at too."""
        self._num_tokens += 1
        new = ""
        if self._splitter is None or self._splitter.push(token_id) is Part.ANSWER:
            self._token_ids.append(token_id)
            self._ends.append(self._num_tokens)
            new = self._detokenizer.push(token_id)
        if last:
            new += self._detokenizer.flush()
        if not new:
            return None
        old = len(self._tail)
        text = self._tail + new
        match = None
        if self._num_tokens >= self._min_tokens:
            match = self._first(text, old)
        if match is not None:
            at, stop = match
            return self._exact(stop, self._tail_start + at)
        keep = min(self._reach, len(text))
        self._tail_start += len(text) - keep
        self._tail = text[len(text) - keep :]
        return None

    def _first(self, text: str, old: int) -> tuple[int, str] | None:
        # A match must end behind `old`: an earlier one was seen, or came before min_tokens.
        found = ((text.find(stop, max(0, old - len(stop) + 1)), stop) for stop in self._stop)
        return min(((at, stop) for at, stop in found if at >= 0), default=None)

    def _exact(self, stop: str, cut: int) -> StopMatch:
        # Characters split over tokens are held back, so the last tokens may lie behind the match already.
        kept = len(self._token_ids)
        while kept > 1 and self._ends[kept - 2] >= self._min_tokens:
            if not self._tokenizer.decode(self._token_ids[: kept - 1]).startswith(stop, cut):
                break
            kept -= 1
        return StopMatch(stop, max(self._ends[kept - 1], self._min_tokens), cut)
