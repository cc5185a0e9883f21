"""PagePool: which KV pages are free, and how many sequences hold each of the others.

Owns page numbers and reference counts, nothing else: no tensors (`cache` holds the memory), no sequences
(`scheduler` decides who gets pages). Pages are lent out first-freed-first, so the free list is also the order
in which a cache of freed pages would lose its contents. A freed page may hold anything, NaN included.

After PagedAttention (Kwon et al. 2023), where a page is called a block.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence


class PagePool:
    """`num_pages` pages of `page_size` tokens. Every operation is O(1) per page."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        if num_pages < 1 or page_size < 1:
            raise ValueError("a pool needs at least one page of at least one token")
        self.num_pages = num_pages
        self.page_size = page_size
        self._free: deque[int] = deque(range(num_pages))
        self._references = [0] * num_pages

    @property
    def num_free(self) -> int:
        return len(self._free)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that `num_tokens` tokens occupy."""
        return -(-num_tokens // self.page_size)

    def allocate(self, count: int) -> list[int] | None:
        """`count` free pages with one reference each, or None (and nothing taken) when there are fewer."""
        if count > len(self._free):
            return None
        pages = [self._free.popleft() for _ in range(count)]
        for page in pages:
            self._references[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One more reference to pages that somebody holds already."""
        for page in pages:
            if self._references[page] < 1:
                raise ValueError(f"page {page} is free and cannot be shared")
            self._references[page] += 1

    def free(self, pages: Iterable[int]) -> None:
        """Give one reference back; a page without any is free again."""
        for page in pages:
            if self._references[page] < 1:
                raise ValueError(f"page {page} is free already")
            self._references[page] -= 1
            if self._references[page] == 0:
                self._free.append(page)

    def check(self, held: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless every page is either free once or held as often as `held` says.

        `held` are the page lists of all live sequences. This is the whole invariant: free + held = all, counts
        exact, no page twice in one sequence.
        """
        counts: Counter[int] = Counter()
        for pages in held:
            assert len(set(pages)) == len(pages), f"a sequence holds a page twice: {pages}"
            counts.update(pages)
        free = set(self._free)
        assert len(free) == len(self._free), "a page is twice in the free list"
        for page in range(self.num_pages):
            assert self._references[page] == counts[page], (
                f"page {page} has {self._references[page]} references and {counts[page]} holders"
            )
            assert (page in free) == (counts[page] == 0), f"page {page} is free and held, or neither"
        assert all(0 <= page < self.num_pages for page in counts.keys() | free), "a page that does not exist"
