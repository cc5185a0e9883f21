"""MakingWay: whose pages are taken when they run out, and who gives its place to one that waits.

Owns these rules. One of lower priority makes way always. One of the same priority does so for another that has
waited behind too many of one asker (it is overtaken): without it a newcomer's requests would begin only as those end
of an asker that fills the engine several times. What turns count is the caller's to say (`Request.turn`). Whoever is
overtaken is so once, and goes on first when there is a place: what it has computed stays in memory until others need
the room. Knows no pages.
"""

from __future__ import annotations

from collections.abc import Sequence as Several

from engine.sequence import Sequence

# By which the other must be later: with one, two that ask for much at the same time would take places for ever.
TURNS = 2


def victim(running: Several[Sequence]) -> Sequence:
    """Of the lowest priority the least computed; of equals, the one admitted last."""
    return min(reversed(running), key=lambda one: (-one.request.priority, one.num_computed))


def makes_way(running: Several[Sequence], newcomer: Sequence, *, place: bool) -> Sequence | None:
    """Who gives its pages to `newcomer`, or where there is no `place`, its place, too; None: nobody."""
    last = victim(running) if running else None
    if last is not None and last.request.priority > newcomer.request.priority:
        return last
    return None if place else overtaken(running, newcomer)


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
