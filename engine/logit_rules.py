"""LogitRules: what one sequence asks to be done to its logits before a token is drawn.

Owns the rules of one sample and what they need to remember: which tokens it has seen and how often it generated
them. It lives and dies with its sequence, so no row of a step can inherit anything from another, and it is made
anew from the tokens alone, so a resumed sequence goes on exactly. Knows no tensors: `adjust` applies the rules.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from engine.sampling_params import SamplingParams

MOST_COUNTED = 2**14  # tokens of a sequence that a device counts by itself: 256 such rows take 34 MB there


class TokenCounts:
    """Distinct tokens of a sequence, in order of appearance, and how often each was generated. `update` reads only
    what is new, so a token costs the same at any length."""

    __slots__ = ("_index", "_num_read", "generated", "token_ids")

    def __init__(self) -> None:
        self.token_ids = array("q")
        self.generated = array("q")  # 0 for those that only the prompt has
        self._index: dict[int, int] = {}
        self._num_read = 0

    def update(self, token_ids: Sequence[int], num_prompt: int) -> None:
        """`token_ids` is the prompt and what was generated; it only ever grows."""
        for position in range(self._num_read, len(token_ids)):
            token_id = token_ids[position]
            index = self._index.setdefault(token_id, len(self.token_ids))
            if index == len(self.token_ids):
                self.token_ids.append(token_id)
                self.generated.append(0)
            if position >= num_prompt:
                self.generated[index] += 1
        self._num_read = len(token_ids)


class LogitRules:
    """`bad_words`: each as the token ids that spell it. `counts`: None unless a penalty is asked for."""

    __slots__ = ("bad_words", "counts", "sampling")

    def __init__(self, sampling: SamplingParams, bad_words: tuple[tuple[int, ...], ...]) -> None:
        self.sampling = sampling
        self.bad_words = bad_words
        penalises = (
            sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1
        )
        self.counts = TokenCounts() if penalises else None

    @classmethod
    def of(cls, sampling: SamplingParams, bad_words: tuple[tuple[int, ...], ...] = ()) -> LogitRules | None:
        """None for a request that asks for none of it."""
        rules = cls(sampling, bad_words)
        asks = rules.counts or bad_words or sampling.biases or sampling.allowed_token_ids is not None
        return rules if asks else None

    @property
    def only_penalise(self) -> bool:
        """Whether nothing but penalties is asked for: then a device that has the counts can go on with them."""
        sampling = self.sampling
        return not (self.bad_words or sampling.biases or sampling.allowed_token_ids is not None)

    def banned(self, token_ids: list[int], num_prompt: int) -> list[int]:
        """Ids that would complete a bad word now. Only what was generated counts as its beginning."""
        found = set()
        for word in self.bad_words:
            begun = len(word) - 1
            if begun == 0 or (
                len(token_ids) - num_prompt >= begun and tuple(token_ids[-begun:]) == word[:-1]
            ):
                found.add(word[-1])
        return sorted(found)
