"""Puts an engine under pressure: expectations that are always too low, so that memory runs out and sequences are
preempted all the time, and pages that are NaN wherever nothing of value may be.
"""

from __future__ import annotations

import random
from collections.abc import Iterable

from engine.engine import Engine
from engine.request import Completion, Request, RequestId
from engine.runner import ModelRunner
from engine.scheduler import Scheduler


def expect_short_answers(scheduler: Scheduler) -> None:
    """As if only one-token answers had been seen, so it admits more than will fit."""
    for _ in range(64):
        scheduler.expectations.lengths.observe([], 1, cut=False)


def poison_free_pages(engine: Engine) -> None:
    """Fill every page that holds nothing of value with NaN."""
    assert isinstance(engine.runner, ModelRunner)
    engine.runner.cache.poison(list(engine.pool.free_pages))


def run(
    engine: Engine, requests: Iterable[Request], *, preempting: bool = False, poison: bool = True
) -> dict[RequestId, Completion]:
    """All completions by id; `check()` after every step, every free page NaN before it."""
    for request in requests:
        engine.add(request)
    done: dict[RequestId, Completion] = {}
    while engine.has_work:
        if preempting:
            expect_short_answers(engine.scheduler)
        if poison:
            poison_free_pages(engine)
        done |= {completion.id: completion for completion in engine.step()}
        engine.check()
    return done


def run_arriving(engine: Engine, requests: Iterable[Request], seed: int) -> dict[RequestId, Completion]:
    """As `run`, but they come shuffled and while others run, and now and then one is preempted. None may fail."""
    rng = random.Random(seed)
    arriving = list(requests)
    rng.shuffle(arriving)
    done: dict[RequestId, Completion] = {}
    while arriving or engine.has_work:
        for _ in range(rng.randrange(4)):
            if arriving:
                engine.add(arriving.pop())
        expect_short_answers(engine.scheduler)
        if engine.scheduler.running and rng.random() < 0.1:
            engine.scheduler.preempt(rng.choice(engine.scheduler.running))
        for completion in engine.step():
            assert completion.error is None
            done[completion.id] = completion
        engine.check()
    return done
