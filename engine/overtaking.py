"""Overtaking: who gives its place to another of the same priority that has waited behind too many of one asker.

Owns the rule. `Request.turn` counts how often the asker already fills the engine, so a newcomer with a few requests
would otherwise wait for the end of as many that run, of somebody who has several times as many in here. Whoever gives
way does so once, and goes on first when there is a place: what it has computed stays in memory until others need the
room. Knows no pages.
"""

from __future__ import annotations

from collections.abc import Sequence as Several

from engine.sequence import Sequence

# By which the other must be later: with one, two that ask for much at the same time would take places for ever.
TURNS = 2


def overtaken(running: Several[Sequence], newcomer: Sequence) -> Sequence | None:
    """Of those that give way to `newcomer` the least computed; of equals, the one admitted last."""
    return min(
        (one for one in reversed(running) if _gives_way(one, newcomer)),
        key=lambda one: one.num_computed,
        default=None,
    )


def _gives_way(one: Sequence, newcomer: Sequence) -> bool:
    mine, theirs = one.request, newcomer.request
    return (
        mine.priority == theirs.priority
        and mine.turn is not None
        and theirs.turn is not None
        and mine.turn >= theirs.turn + TURNS
        and mine.cache_salt != theirs.cache_salt  # an asker's own are in the order that it wants
        and one.num_preemptions == 0
    )
