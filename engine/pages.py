"""PagePool: which KV pages are free, which are only remembered, and how many sequences hold each of the others.

Owns page numbers and reference counts, nothing else: no tensors (`cache` holds the memory), no contents
(`prefix_cache` knows what a page holds), no sequences (`scheduler` decides who gets pages). Every page is in
exactly one of three states: *owned* by at least one sequence; *cached*, owned by nobody but holding something
that may be wanted again; *free*, holding anything, NaN included. free + cached + owned = all.

Cached pages lie in one line from cold to hot. Allocation takes free pages first, then the coldest cached ones.
After PagedAttention (Kwon et al. 2023), where a page is called a block.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice


class PagePool:
    """`num_pages` pages of `page_size` tokens. Every operation is O(1) per page.

    `on_evict` is told of each cached page just before it is lent to somebody else.
    """

    def __init__(
        self, num_pages: int, page_size: int, on_evict: Callable[[int], None] = lambda page: None
    ) -> None:
        if num_pages < 1 or page_size < 1:
            raise ValueError("a pool needs at least one page of at least one token")
        self.num_pages = num_pages
        self.page_size = page_size
        self.on_evict = on_evict
        self._free: deque[int] = deque(range(num_pages))
        self._cached: OrderedDict[int, None] = OrderedDict()  # coldest first
        self._remembered = bytearray(num_pages)  # 1: becomes cached, not free, when its last holder leaves
        self._references = [0] * num_pages

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def free_pages(self) -> Iterable[int]:
        return iter(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_owned(self) -> int:
        return self.num_pages - self.num_available

    @property
    def num_available(self) -> int:
        """What `allocate` can give: free and cached pages."""
        return len(self._free) + len(self._cached)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that `num_tokens` tokens occupy."""
        return -(-num_tokens // self.page_size)

    def is_cached(self, page: int) -> bool:
        return page in self._cached

    def is_shared(self, page: int) -> bool:
        return self._references[page] > 1

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages with one reference each, or None (and nothing taken) when too few are available."""
        if count > self.num_available:
            return None
        pages = []
        for _ in range(count):
            if self._free:
                page = self._free.popleft()
            else:
                page, _ = self._cached.popitem(last=False)
                self._remembered[page] = 0
                self.on_evict(page)
            self._references[page] = 1
            pages.append(page)
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One more reference to pages that are owned or cached."""
        for page in pages:
            if self._references[page] < 1:
                if page not in self._cached:
                    raise ValueError(f"page {page} is free and cannot be shared")
                del self._cached[page]
            self._references[page] += 1

    def free(self, pages: Iterable[int], *, cold: bool = False) -> None:
        """Give one reference back. A page without any is cached when it is remembered, else free again.

        Cached pages join the hot end, so of `pages` the first is evicted first; with `cold` they join the
        cold end, so the last of them is.
        """
        for page in pages:
            if self._references[page] < 1:
                raise ValueError(f"page {page} is free already")
            self._references[page] -= 1
            if self._references[page]:
                continue
            if self._remembered[page]:
                self._cached[page] = None
                if cold:
                    self._cached.move_to_end(page, last=False)
            else:
                self._free.append(page)

    def remember(self, page: int) -> None:
        """What an owned page holds may be wanted again after its last holder has left."""
        if self._references[page] < 1:
            raise ValueError(f"page {page} is not owned and cannot be remembered")
        self._remembered[page] = 1

    def forget(self, page: int) -> None:
        """What the page holds is worthless: a cached page becomes free at once."""
        self._remembered[page] = 0
        if page in self._cached:
            del self._cached[page]
            self._free.append(page)

    def coldest(self, count: int) -> Iterator[int]:
        """The cached pages that would be evicted next, in that order."""
        return islice(self._cached, count)

    def check(self, held: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless every page is free, cached or owned, and owned as often as `held` says.

        `held` are the page lists of all live sequences. This is the whole invariant: free + cached + owned =
        all, reference counts exact, no page twice in one sequence.
        """
        counts: Counter[int] = Counter()
        for pages in held:
            require(len(set(pages)) == len(pages), f"a sequence holds a page twice: {pages}")
            counts.update(pages)
        free = set(self._free)
        require(len(free) == len(self._free), "a page is twice in the free list")
        for page in range(self.num_pages):
            references = self._references[page]
            require(
                references == counts[page],
                f"page {page} has {references} references and {counts[page]} holders",
            )
            states = (page in free) + (page in self._cached) + (references > 0)
            require(states == 1, f"page {page} is in {states} of the states free, cached and owned")
            require(page not in free or not self._remembered[page], f"page {page} is free and remembered")
            require(
                page not in self._cached or bool(self._remembered[page]), f"page {page} is cached in vain"
            )
        require(
            all(0 <= page < self.num_pages for page in counts.keys() | free), "a page that does not exist"
        )


def require(held: bool, violation: str) -> None:
    """`assert` that also holds under `python -O`: production checks at idle, too."""
    if not held:
        raise AssertionError(violation)
