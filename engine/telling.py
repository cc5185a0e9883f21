"""Telling: what one kind of listener has been told of each request, so that it is told only of what is new.

Owns the counts. Checkpoints and streams are told at different times and of different things, and each has a
`Telling` of its own. Knows neither steps nor pipes (`engine`, `process`).
"""

from __future__ import annotations

from collections.abc import Mapping

from engine.growth import Growth
from engine.request import Generated, RequestId
from engine.run import Run


class Telling:
    """A request is told of from `begin` to `end`."""

    def __init__(self) -> None:
        self._told: dict[RequestId, tuple[int, ...]] = {}  # tokens of each sample

    def __len__(self) -> int:
        return len(self._told)

    def begin(self, request_id: RequestId, told: tuple[int, ...]) -> None:
        """`told`: tokens of each sample that the listener knows of already."""
        self._told[request_id] = told

    def end(self, request_id: RequestId) -> None:
        self._told.pop(request_id, None)

    def grown(self, runs: Mapping[RequestId, Run]) -> list[Growth]:
        """Everything that is new, for a checkpoint. All growths of a request, put together, are one."""
        growths: list[Growth] = []
        for request_id, told in self._told.items():
            run = runs[request_id]
            counts = run.counts
            starts = tuple(map(min, told, counts))  # a stop string takes tokens back
            if counts != starts:
                growths.append(Growth(id=request_id, starts=starts, generated=run.generated_since(starts)))
                self._told[request_id] = counts
        return growths

    def streamed(self, runs: Mapping[RequestId, Run]) -> list[Growth]:
        """The new tokens, and nothing else, of samples that go on: how one ends, and which of its last tokens count,
        its completion says."""
        growths: list[Growth] = []
        for request_id, told in self._told.items():
            samples = runs[request_id].sequences
            counts = tuple(
                begin if sample.output else sample.num_generated
                for sample, begin in zip(samples, told, strict=True)
            )
            if counts != told:
                made = tuple(
                    Generated(
                        token_ids=tuple(
                            sample.token_ids[sample.num_prompt + begin : sample.num_prompt + count]
                        )
                    )
                    for sample, begin, count in zip(samples, told, counts, strict=True)
                )
                begins = samples[0].request.begins
                growths.append(Growth(id=request_id, starts=told, generated=made, begins=begins))
                self._told[request_id] = counts
        return growths
