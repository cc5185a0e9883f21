"""GrowingSample: what one sample thinks and says so far, and how much of it is certain to be in its result.

Owns the text that is held back: the beginning of a character, whatever may still become a stop string, with which
the answer ends before it, and white space that may be the last of a reasoning, which goes without. Knows neither
Redis nor the engine; tokens that end a sample never come here (`engine.telling`).
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.detokenizer import Detokenizer
from engine.reasoning import Part, Splitter, parts_of
from engine.tokenizer import Tokenizer


class GrowingSample:
    """`splitter`: tells its parts apart; None: all is answer."""

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), splitter: Splitter | None = None
    ) -> None:
        self.reasoning = GrowingText(tokenizer, stripped=True)
        self.answer = GrowingText(tokenizer, stop)
        self._splitter = splitter
        self._num_tokens = 0

    def push(self, start: int, token_ids: Sequence[int]) -> None:
        """Take tokens from place `start` on. Those that came before are passed over; behind a gap, all are."""
        if start > self._num_tokens:
            return
        new = token_ids[self._num_tokens - start :]
        self._num_tokens += len(new)
        parts = parts_of(new, self._splitter)
        self.reasoning.push(parts[Part.REASONING])
        self.answer.push(parts[Part.ANSWER])


class GrowingText:
    """`text[:certain]` only ever grows, and the final text begins with it. `stripped`: that is without white space
    around it."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, stripped: bool = False) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stop = tuple(stop)
        self._stripped = stripped
        self._parts: list[str] = []
        self._tail = ""  # the last characters, as many as a stop string may reach back
        self._reach = max((len(stop) - 1 for stop in self._stop), default=0)
        self._num_chars = 0
        self.certain = 0

    def push(self, token_ids: Sequence[int]) -> None:
        """Take the next tokens."""
        new = "".join(map(self._detokenizer.push, token_ids))
        if self._stripped and not self._num_chars:
            new = new.lstrip()
        if not new:
            return
        self._parts.append(new)
        self._num_chars += len(new)
        if self._stripped:
            if shown := len(new.rstrip()):
                self.certain = self._num_chars - len(new) + shown
            return
        self._tail = (self._tail + new)[-self._reach :] if self._reach else ""
        self.certain = max(self.certain, self._num_chars - self._num_held_back())

    def read(self, start: int) -> str:
        """The certain text from character `start` on."""
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        return self._parts[0][start : self.certain] if self._parts else ""

    def _num_held_back(self) -> int:
        """Characters at the end that are the beginning of a stop string."""
        longest = 0
        for stop in self._stop:
            for count in range(min(len(stop) - 1, len(self._tail)), longest, -1):
                if self._tail.endswith(stop[:count]):
                    longest = count
                    break
        return longest
