"""Comparison: ours and one peer on one workload, in alternating pairs.

Owns the order of the runs and the medians. Knows neither how a run is made nor how it is shown.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from tests.bench.peers.once import Unavailable
from tests.bench.peers.side import Run

Who = Literal["ours", "theirs"]
ORDERS: Final[tuple[tuple[Who, Who], tuple[Who, Who]]] = (("ours", "theirs"), ("theirs", "ours"))


@dataclass(slots=True, kw_only=True)
class Comparison:
    """`pairs` are (ours, theirs), whole ones only. `failed`: why there are no more, and whose fault it was."""

    workload: str
    peer: str
    pairs: list[tuple[Run, Run]] = field(default_factory=list)
    failed: str | None = None

    def figures(self) -> dict[str, Any]:
        """Medians over the pairs; `ratio` is the median of the pairs' own ratios, above 1 where ours makes more
        tokens a second."""
        found: dict[str, Any] = {"workload": self.workload, "peer": self.peer, "pairs": len(self.pairs)}
        if self.failed:
            found["failed"] = self.failed
        if not self.pairs:
            return found
        for k, side in enumerate(("ours", "theirs")):
            runs = [pair[k] for pair in self.pairs]
            found[side] = {
                "output_tok_s": round(statistics.median(run.tokens_per_second for run in runs), 2),
                "seconds": round(statistics.median(run.seconds for run in runs), 3),
                "start_up_seconds": round(statistics.median(run.start_up_seconds for run in runs), 2),
                "all_tok_s": [round(run.tokens_per_second, 2) for run in runs],
                "dtype": runs[0].dtype,
                "notes": runs[0].notes,
                "versions": runs[0].versions,
            }
        found["output_tokens"] = self.pairs[0][0].output_tokens
        ratios = [a.tokens_per_second / b.tokens_per_second for a, b in self.pairs]
        found["ratio"] = round(statistics.median(ratios), 3)
        found["ratios"] = [round(ratio, 3) for ratio in ratios]
        return found


def compared(workload: str, peer: str, pairs: int, run: Callable[[Who], Run]) -> Comparison:
    """Every second pair begins with the peer, so that a machine that grows slower favours nobody. Ends at the first
    run that gives no figure; the pairs before it count."""
    comparison = Comparison(workload=workload, peer=peer)
    for number in range(pairs):
        made: dict[Who, Run] = {}
        for who in ORDERS[number % 2]:
            try:
                made[who] = run(who)
            except Unavailable as reason:
                comparison.failed = f"{'ours' if who == 'ours' else peer}: {reason}"
                return comparison
        comparison.pairs.append((made["ours"], made["theirs"]))
    return comparison
