"""OutputLengths and Forecast: the figures of a plain computation."""

from __future__ import annotations

from itertools import accumulate

from hypothesis import given
from hypothesis import strategies as st

from engine.forecast import Forecast
from engine.lengths import ENDLESS, MIN_SAMPLES, OutputLengths

ENDED = st.lists(st.tuples(st.integers(1, 60), st.booleans()), min_size=MIN_SAMPLES, max_size=40)
SIZES = st.lists(st.tuples(st.integers(1, 500), st.integers(1, 300)), max_size=20)


@given(ENDED, st.integers(1, 80), st.integers(0, 80))
def test_the_mean_of_longer_answers_none_counted_above_the_ceiling(
    ended: list[tuple[int, bool]], most: int, made: int
) -> None:
    lengths = OutputLengths()
    for length, cut in ended:
        lengths.observe([], length, cut=cut)
    longer = [length for length, cut in ((ENDLESS if c else n, c) for n, c in ended) if length > made]
    counted = [min(length, most) for length in longer]
    wanted = -(-sum(counted) // len(counted)) if counted else min(most, made + made // 2 + 16)
    assert lengths.expected([], most, made) == wanted


@given(SIZES, st.lists(st.tuples(st.integers(1, 500), st.integers(1, 300)), min_size=1, max_size=5))
def test_the_peak_does_not_depend_on_who_joined_when(
    running: list[tuple[int, int]], joining: list[tuple[int, int]]
) -> None:
    forecast, unasked = (Forecast([t for t, _ in running], [r for _, r in running], 3, 16) for _ in range(2))
    for i, (tokens, remaining) in enumerate(joining):
        peak = forecast.peak_with(tokens, remaining)
        assert forecast.fits(tokens, remaining, peak)
        assert not forecast.fits(tokens, remaining, peak - 0.01)
        forecast.add(tokens, remaining)
        assert unasked.fits(tokens, remaining, 1e9)
        unasked.add(tokens, remaining)
        everybody = sorted(running + joining[: i + 1], key=lambda one: -one[1])
        sums = accumulate(tokens for tokens, _ in everybody)
        last = enumerate(zip(sums, everybody, strict=True), start=1)
        owned = [total + k * (one[1] - 1 + 15 / 2) for k, (total, one) in last]
        assert abs(peak - (3 + max(owned) / 16)) < 1e-6
    assert unasked.peak_with(5, 7) == forecast.peak_with(5, 7)
