"""OutputLengths: how many tokens a request will probably generate, learned from those that have ended.

Owns the samples and the estimate. `max_tokens` is a ceiling that most requests never reach; reserving memory for
it would run a fraction of what fits. Requests made from one template answer alike, so lengths are kept
per prompt prefix, at depths of 1, 2, 4, 8, … pages, and the deepest prefix with enough samples speaks. Knows no
pages' owners and no clock. After the learned admission of LightLLM's "past-future" scheduler (Gong et al. 2025).
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Sequence
from itertools import accumulate

MIN_SAMPLES = 4  # fewer say nothing
MAX_SAMPLES = 64  # per prefix; the oldest go first
MAX_PREFIXES = 4096
ENDLESS = 2**31  # in place of the length of an answer that `max_tokens` cut


class _Samples:
    __slots__ = ("latest", "ordered", "sums")

    def __init__(self) -> None:
        self.latest: deque[int] = deque(maxlen=MAX_SAMPLES)
        self.ordered: list[int] | None = None  # made when asked for
        self.sums: list[int] = []  # of the first k of `ordered`

    def add(self, length: int) -> None:
        self.latest.append(length)
        self.ordered = None

    def longer_than(self, length: int, most: int) -> tuple[int, int]:
        """How many are, and their sum, none counted above `most`."""
        if self.ordered is None:
            self.ordered = sorted(self.latest)
            self.sums = [0, *accumulate(self.ordered)]
        first = bisect_right(self.ordered, length)
        cut = bisect_right(self.ordered, most, first)
        number = len(self.ordered)
        return number - first, self.sums[cut] - self.sums[first] + (number - cut) * most


class OutputLengths:
    """`keys` are a prompt's page keys (`page_names`), one per full page."""

    def __init__(self) -> None:
        self._by_prefix: OrderedDict[bytes, _Samples] = OrderedDict()  # least recently used first
        self._all = _Samples()

    def observe(self, keys: Sequence[bytes], num_generated: int, *, cut: bool) -> None:
        """A sample ended after so many tokens; `cut`: by its own `max_tokens`, not by the model."""
        length = ENDLESS if cut else num_generated
        self._all.add(length)
        for key in _depths(keys):
            samples = self._by_prefix.pop(key, None) or _Samples()
            samples.add(length)
            self._by_prefix[key] = samples
        while len(self._by_prefix) > MAX_PREFIXES:
            self._by_prefix.popitem(last=False)

    def expected(self, keys: Sequence[bytes], max_tokens: int, num_generated: int = 0) -> int:
        """The mean length of answers longer than `num_generated`, in tokens, none counted above `max_tokens`.

        `max_tokens` itself while nothing is known; half as much again for an answer longer than all before it.
        """
        samples = self._of(keys)
        if samples is None:
            return max_tokens
        number, total = samples.longer_than(num_generated, max_tokens)
        if not number:
            return min(max_tokens, num_generated + num_generated // 2 + 16)
        return -(-total // number)

    def _of(self, keys: Sequence[bytes]) -> _Samples | None:
        for key in reversed(list(_depths(keys))):
            samples = self._by_prefix.get(key)
            if samples is not None and len(samples.latest) >= MIN_SAMPLES:
                return samples
        return self._all if len(self._all.latest) >= MIN_SAMPLES else None


def _depths(keys: Sequence[bytes]) -> list[bytes]:
    return [keys[(1 << i) - 1] for i in range(len(keys).bit_length())]
