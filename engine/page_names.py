"""PageNames: what the contents of a sequence's full pages are called, so that equal contents have equal names.

Owns the SHA-256 chain over all tokens up to a page's end, beginning with the request's salt. Knows neither where such
contents are (`prefix_cache`) nor who makes use of the names: they also say who waits for whom (`warming`), who stands
beside whom in the queue (`waiting`), and whose answers will be about as long (`lengths`).
"""

from __future__ import annotations

import hashlib
from array import array
from functools import lru_cache

from engine.sequence import Sequence


@lru_cache(maxsize=1024)
def _root(salt: str) -> bytes:
    """What the chain of a first page begins with."""
    return hashlib.sha256(b"nightpress\0" + salt.encode()).digest()


class PageNames:
    """`shared`: sequences of one salt have names in common; else each has its own, for itself after a preemption."""

    def __init__(self, page_size: int, *, shared: bool) -> None:
        self._page_size = page_size
        self._shared = shared

    def chain(self, sequence: Sequence, num_tokens: int) -> list[bytes]:
        """Those of `sequence`'s pages, at least of all that lie whole within its first `num_tokens` tokens."""
        size, names = self._page_size, sequence.keys
        begin, end = len(names), num_tokens // size
        if begin >= end:
            return names
        name = self.parent(sequence, begin)
        tokens = array("I", sequence.token_ids[begin * size : end * size]).tobytes()
        step = len(tokens) // (end - begin)
        for at in range(0, len(tokens), step):
            name = hashlib.sha256(name + tokens[at : at + step]).digest()
            names.append(name)
        return names

    def of_prompt(self, sequence: Sequence) -> list[bytes]:
        """Those of the pages that lie whole within its prompt."""
        return self.chain(sequence, sequence.num_prompt)[: sequence.num_prompt // self._page_size]

    def parent(self, sequence: Sequence, index: int) -> bytes:
        """Of the page before page `index`; what the chain begins with, of the first."""
        if index:
            return self.chain(sequence, index * self._page_size)[index - 1]
        salt, request_id = sequence.request.cache_salt, sequence.request.id
        if self._shared:
            return _root(salt)
        return _root(f"{salt}\0{request_id.job_id}\0{request_id.fence}\0{sequence.index}")
