"""Overtaking: who gives its place to another of the same priority that has waited behind too many of one asker.

Owns the rule. Without it a newcomer's requests would begin only as those end of an asker that fills the engine
several times. What turns count is the caller's to say (`Request.turn`). Whoever gives way does so once, and goes on
first when there is a place: what it has computed stays in memory until others need the room. Knows no pages.
"""

from __future__ import annotations

from collections.abc import Sequence as Several

from engine.sequence import Sequence

# By which the other must be later: with one, two that ask for much at the same time would take places for ever.
TURNS = 2


def overtaken(running: Several[Sequence], newcomer: Sequence) -> Sequence | None:
    """Of those that give way to `newcomer` the least computed; of equals, the one admitted last."""
    asks = newcomer.request
    if asks.turn is None:
        return None
    later = asks.turn + TURNS
    giving_way = (
        one
        for one in reversed(running)
        if one.request.turn is not None
        and one.request.turn >= later
        and one.request.priority == asks.priority
        and one.request.cache_salt != asks.cache_salt  # an asker's own are in the order that it wants
        and one.num_preemptions == 0
    )
    return min(giving_way, key=lambda one: one.num_computed, default=None)
