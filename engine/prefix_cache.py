"""PrefixCache: what the pages hold, so that nothing is computed twice while it is still somewhere in memory.

Owns where contents are: on a page of the device, in a slot of host memory, or both. A full page is found by its name
(`page_names`), and a hit compares its tokens too, so no collision can mix two requests. The start of a page (the end
of a prompt, the rest of a preempted sequence) can be found as well: it is copied, never shared, so a page has one
writer.

Evicted contents go to host memory when `keeps` says that bringing them back costs less than computing them again;
there they are a second level of the same cache. Swapping a preempted sequence out is no case of its own: its
pages become cached, tail first in line for eviction, and are found again, wherever they are by then.

Refuses to know tensors (it asks for `Move`s) and who runs next (`scheduler`). After the prefix caching of
vLLM and SGLang (Zheng et al. 2024).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from engine.page_names import PageNames
from engine.pages import PagePool, require
from engine.plan import Move
from engine.sequence import Sequence

MIN_COPIED = 4  # tokens: for fewer a copied page is not worth its trouble
SWAP_GROUP = 16  # pages that go out together: fewer, larger copies


@dataclass(slots=True, eq=False)
class Entry:
    """Contents with a name. `key` is None while they do not fill their page."""

    parent: bytes  # the chain up to the page before
    key: bytes | None
    tokens: tuple[int, ...]
    page: int | None
    slot: int | None = None
    generated: bool = False  # of a sequence that has ended: hardly ever asked for again


class Match(NamedTuple):
    """What is there of a sequence: whole pages, then `tail_tokens` tokens at the start of `tail`."""

    whole: list[Entry]
    tail: Entry | None
    tail_tokens: int


class PrefixCache:
    """`num_host_pages` slots of host memory as second level; `keeps()` decides at each eviction."""

    def __init__(
        self,
        pool: PagePool,
        *,
        enabled: bool = True,
        num_host_pages: int = 0,
        keeps: Callable[[], bool] = lambda: True,
    ) -> None:
        self.pool = pool
        self.enabled = enabled  # False: a sequence finds its own pages after a preemption, and nobody else's
        self.names = PageNames(pool.page_size, shared=enabled)
        self.num_host_pages = num_host_pages
        self.moves: list[Move] = []  # for the next step; whoever makes the plan takes them
        self.num_swapped_out = self.num_swapped_in = 0  # pages
        self._keeps = keeps
        self._by_key: dict[bytes, Entry] = {}
        self._by_start: dict[tuple[bytes, int], Entry] = {}  # (parent, first token)
        self._by_page: dict[int, Entry] = {}
        self._slots: OrderedDict[int, Entry] = OrderedDict()  # least recently used first
        self._free_slots = list(range(num_host_pages - 1, -1, -1))
        self._pinned: set[int] = set()  # slots that a move of this very plan will read
        pool.on_evict = self._evicted

    def take_moves(self) -> tuple[Move, ...]:
        """What must move before the next step computes anything."""
        moves = tuple(self.moves)
        self.moves.clear()
        return moves

    # --- finding --------------------------------------------------------------------------------------------

    def match(self, sequence: Sequence) -> Match:
        """What is in the cache of the tokens that need not be computed (`Sequence.num_reusable`)."""
        size, tokens = self.pool.page_size, sequence.token_ids
        limit = sequence.num_reusable
        keys = self.names.chain(sequence, limit)
        whole: list[Entry] = []
        for i in range(limit // size):
            entry = self._by_key.get(keys[i])
            if entry is None or not self._holds(entry, sequence, i):
                break
            whole.append(entry)
        at = len(whole) * size
        parent = self.names.parent(sequence, len(whole))
        tail = self._by_start.get((parent, tokens[at])) if at < limit else None
        if tail is None:
            return Match(whole, None, 0)
        end = min(len(tail.tokens), limit - at)
        same = next((i for i in range(end) if tail.tokens[i] != tokens[at + i]), end)
        return Match(whole, tail, same) if same >= MIN_COPIED else Match(whole, None, 0)

    def acquire(self, sequence: Sequence, match: Match, num_tokens: int) -> bool:
        """Give a sequence without pages those for its first `num_tokens` tokens, with all that `match` found,
        and say how many are computed. False, and nothing changed, when too few pages are available."""
        resident = [entry.page for entry in match.whole if entry.page is not None]
        count = self.pool.pages_for(num_tokens) - len(resident)
        if count > self.pool.num_available - sum(map(self.pool.is_cached, resident)):
            return False
        self.pool.share(resident)
        found = [*match.whole, match.tail] if match.tail else match.whole
        self._pin([entry.slot for entry in found if entry.slot is not None])
        copied = match.tail.page if match.tail else None  # read before anything can overwrite it
        fresh = self.pool.allocate(count) or []
        rest = iter(fresh)
        pages = [next(rest) if entry.page is None else entry.page for entry in match.whole]
        tail_page = next(rest, None)
        if match.tail and tail_page is not None:
            if copied == tail_page:  # it was evicted to make room, and is just where it is wanted
                pass
            elif copied is not None:
                self.moves.append(Move("copy", copied, tail_page))
            else:
                self._load(match.tail, tail_page)
        for entry, page in zip(match.whole, pages, strict=True):
            if entry.page is None:
                self._load(entry, page)
                self._place(entry, page)
        self._pinned.clear()
        sequence.pages = pages + ([] if tail_page is None else [tail_page, *rest])
        sequence.num_computed = len(match.whole) * self.pool.page_size + match.tail_tokens
        return True

    def _holds(self, entry: Entry, sequence: Sequence, index: int) -> bool:
        size = self.pool.page_size
        return entry.parent == self.names.parent(sequence, index) and entry.tokens == tuple(
            sequence.token_ids[index * size : (index + 1) * size]
        )

    # --- filling --------------------------------------------------------------------------------------------

    def store(self, sequence: Sequence, start: int, end: int) -> None:
        """Pages `start` to `end` of `sequence` are computed and full. Where the same contents are on another
        page already, the sequence takes that one."""
        size = self.pool.page_size
        keys = self.names.chain(sequence, end * size)
        for i in range(start, end):
            page, entry = sequence.pages[i], self._by_key.get(keys[i])
            if entry is None or not self._holds(entry, sequence, i):
                tokens = tuple(sequence.token_ids[i * size : (i + 1) * size])
                self._add(Entry(self.names.parent(sequence, i), keys[i], tokens, None), page)
            elif entry.page is None:
                self._place(entry, page)
            elif entry.page != page:
                self.pool.share([entry.page])
                self._displace(page)
                self.pool.free([page])
                sequence.pages[i] = entry.page

    def store_tail(self, sequence: Sequence, num_tokens: int) -> None:
        """The page that `num_tokens` computed tokens fill in part can be copied from now on."""
        index, rest = divmod(num_tokens, self.pool.page_size)
        if rest == 0:
            return
        start = index * self.pool.page_size
        tokens = tuple(sequence.token_ids[start : start + rest])
        parent, page = self.names.parent(sequence, index), sequence.pages[index]
        known = self._by_start.get((parent, tokens[0]))
        if known is None or known.tokens[:rest] != tokens:
            self._add(Entry(parent, None, tokens, None), page)

    def release(self, sequence: Sequence, *, preempted: bool = False) -> None:
        """Take all pages from `sequence`. What a preempted one has computed is kept in full, and what is
        evicted of it first is its tail; an ended one's prompt is kept, its own tokens only until room is needed."""
        if preempted:
            self.store_tail(sequence, sequence.num_computed)
            self.pool.free(reversed(sequence.pages))
        elif not self.enabled:
            self.discard(sequence)
            self.pool.free(sequence.pages)
        else:
            kept = self.pool.pages_for(sequence.num_prompt)
            self.pool.free(reversed(sequence.pages[:kept]))
            for page in sequence.pages[kept:]:
                if page in self._by_page:
                    self._by_page[page].generated = True
            self.pool.free(sequence.pages[kept:], cold=True)
        sequence.pages = []
        sequence.num_computed = 0

    def discard(self, sequence: Sequence) -> None:
        """Nobody is to find what the pages of `sequence` hold; they stay its own."""
        for page in sequence.pages:
            if page in self._by_page:
                self._forget(self._by_page[page])

    def _add(self, entry: Entry, page: int) -> None:
        if entry.key is not None:
            known = self._by_key.get(entry.key)
            if known is not None:  # the same name for other tokens: the newer one stays
                self._forget(known)
            self._by_key[entry.key] = entry
        start = (entry.parent, entry.tokens[0])
        before = self._by_start.get(start)
        if before is not None and before.key is None:  # found by its start alone
            self._forget(before)
        self._by_start[start] = entry
        self._place(entry, page)

    def _place(self, entry: Entry, page: int) -> None:
        self._displace(page)
        entry.page = page
        self._by_page[page] = entry
        self.pool.remember(page)

    def _displace(self, page: int) -> None:
        """The page no longer counts as holding what it was known for."""
        entry = self._by_page.pop(page, None)
        if entry is not None:
            entry.page = None
            self.pool.forget(page)
            if entry.slot is None:
                self._forget(entry)

    def _forget(self, entry: Entry) -> None:
        """Nobody finds these contents any more."""
        if entry.key is not None and self._by_key.get(entry.key) is entry:
            del self._by_key[entry.key]
        start = (entry.parent, entry.tokens[0])
        if self._by_start.get(start) is entry:
            del self._by_start[start]
        if entry.page is not None:
            page, entry.page = entry.page, None
            del self._by_page[page]
            self.pool.forget(page)
        if entry.slot is not None:
            del self._slots[entry.slot]
            self._free_slots.append(entry.slot)
            entry.slot = None

    # --- second level ---------------------------------------------------------------------------------------

    def _evicted(self, page: int) -> None:
        entry = self._by_page.pop(page)
        if entry.slot is None and not entry.generated and self.num_host_pages and self._keeps():
            self._swap_out(entry, page)
            for other in self.pool.coldest(SWAP_GROUP - 1):  # their turn comes next: one large copy now
                if self._by_page[other].slot is None and not self._by_page[other].generated:
                    self._swap_out(self._by_page[other], other)
        entry.page = None
        if entry.slot is None:
            self._forget(entry)

    def _pin(self, slots: list[int]) -> None:
        """They are used now, and nothing may take them until all their moves are asked for."""
        self._pinned.update(slots)
        for slot in slots:
            self._slots.move_to_end(slot)

    def _swap_out(self, entry: Entry, page: int) -> None:
        if not self._free_slots:
            slot, oldest = next(iter(self._slots.items()))
            if slot in self._pinned:  # then all are that were not filled for this very plan
                return
            oldest.slot = None
            del self._slots[slot]
            self._free_slots.append(slot)
            if oldest.page is None:
                self._forget(oldest)
        entry.slot = self._free_slots.pop()
        self._slots[entry.slot] = entry
        self.moves.append(Move("out", page, entry.slot))
        self.num_swapped_out += 1

    def _load(self, entry: Entry, page: int) -> None:
        assert entry.slot is not None
        self.moves.append(Move("in", entry.slot, page))
        self.num_swapped_in += 1

    def check(self) -> None:
        """Raise AssertionError unless every index tells of the same contents, in places that exist."""
        for page, entry in self._by_page.items():
            require(entry.page == page, f"page {page} is listed for contents that are elsewhere")
            require(len(entry.tokens) <= self.pool.page_size, f"page {page} holds too many tokens")
        for slot, entry in self._slots.items():
            require(entry.slot == slot, f"host slot {slot} is listed for contents that are elsewhere")
        known = {*self._by_page.values(), *self._slots.values()}
        for entry in (*self._by_key.values(), *self._by_start.values()):
            require(entry in known, "contents can be found that are nowhere")
        slots = [*self._free_slots, *self._slots]
        require(sorted(slots) == list(range(self.num_host_pages)), "a host slot is lost or used twice")
        remembered = {page for page in range(self.pool.num_pages) if self.pool.is_cached(page)}
        require(remembered <= self._by_page.keys(), "a cached page holds nothing that is known")
