"""KVCache: the memory of all pages, and moves of pages.

Owns the tensors, on the device and in the host memory that pages are swapped to. Knows nothing of who owns
which page, nor how many fit (`memory`). Layout as `kernels` writes it down. The memory is left uninitialised:
kernels never read a slot that no context covers.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.model_config import ModelConfig
from engine.plan import Move
from engine.sampling_params import InvalidParameter
from engine.shortage import is_shortage
from engine.staging import staged_ints
from kernels import PagedKV

EIGHT_BITS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
STAGING_BYTES = 2**26  # device memory that a move may take for itself
_TIMED_PAGES = 16

Pairs = Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True, eq=False)
class KVCache:
    """Made by `allocate`. A move takes whole pages, bit by bit: all layers, K, V and scales.

    Pairs of a move are (from, to). In one call a page may be read by many pairs; no page may be written twice,
    or both read and written. Raises `ValueError` for that, `IndexError` for a page that does not exist. On
    CUDA moves are queued like kernels, in the order of the calls.
    """

    layers: list[PagedKV]
    dtype: str  # of what is stored: that of the model, or int8 or fp8
    page_bytes: int  # all layers, K and V, scales included
    num_pages: int
    num_host_pages: int
    _parts: tuple[Tensor, ...]  # elements, and scales where there are any: [layers, 2, pages, words] int64
    _host: Tensor | None  # [host pages, layers, 2, words of all parts] int64: one page lies in one piece

    @classmethod
    def allocate(
        cls,
        config: ModelConfig,
        num_pages: int,
        page_size: int,
        *,
        dtype: torch.dtype,
        device: str,
        storage: torch.dtype | None = None,
        num_host_pages: int = 0,
        keys_by_token: bool = False,
    ) -> KVCache:
        """`dtype`: of the activations. `storage`: int8 or float8_e4m3fn; None: as the activations. `keys_by_token`:
        how K lies, as the kernels want it.

        Raises `InvalidParameter` naming `kv_cache_memory_bytes` when the memory cannot be had, or
        `swap_space_bytes` when that of the host cannot.
        """
        storage = storage or dtype
        layers, heads, dim = config.num_layers, config.num_kv_heads, config.head_dim
        try:
            elements = torch.empty(
                (layers, 2, num_pages, heads * dim * page_size), dtype=storage, device=device
            )
            scaled_layers = layers if storage.itemsize == 1 else 0
            scales = torch.empty(
                (scaled_layers, 2, num_pages, heads * page_size), dtype=torch.bfloat16, device=device
            )
        except RuntimeError as error:
            raise InvalidParameter(
                "kv_cache_memory_bytes", f"{num_pages} pages do not fit: {error}"
            ) from None
        # page_size is a multiple of 16, so a layer of a page is whole words of 8 bytes
        parts = tuple(part.view(torch.int64) for part in (elements, scales) if part.shape[0])
        host_shape = (num_host_pages, layers, 2, sum(part.shape[3] for part in parts))
        try:
            pinned = torch.device(device).type == "cuda"
            host = torch.empty(host_shape, dtype=torch.int64, pin_memory=pinned) if num_host_pages else None
        except RuntimeError as error:
            raise InvalidParameter(
                "swap_space_bytes", f"{num_host_pages} pages do not fit in host memory: {error}"
            ) from None
        return cls(
            layers=[
                PagedKV(
                    elements[i, 0].view(num_pages, heads, page_size, dim).transpose(2, 3)
                    if keys_by_token
                    else elements[i, 0].view(num_pages, heads, dim, page_size),
                    elements[i, 1].view(num_pages, heads, page_size, dim),
                    *(part.view(num_pages, heads, page_size) for part in scales[i : i + 1].flatten(0, 1)),
                )
                for i in range(layers)
            ],
            dtype=dtype_name(storage),
            page_bytes=8 * sum(part[:, :, :1].numel() for part in parts),
            num_pages=num_pages,
            num_host_pages=num_host_pages,
            _parts=parts,
            _host=host,
        )

    def move(self, moves: list[Move]) -> None:
        """A plan's moves, one after another as far as anybody can see, in as few calls as that allows. Those that are
        made leave the list; a device that has no memory for a page (`shortage`) leaves the rest."""
        for kind, pairs in grouped(tuple(moves)):
            self._move(kind, pairs)
            del moves[: len(pairs)]

    def _move(self, kind: str, pairs: Pairs) -> None:
        """All that is read here lies where nothing is written: what was begun can be done again."""
        move = {"copy": self.copy, "out": self.swap_out, "in": self.swap_in}[kind]
        try:
            return move(pairs)
        except RuntimeError as error:
            if len(pairs) == 1 or not is_shortage(error):
                raise
        middle = len(pairs) // 2
        self._move(kind, pairs[:middle])
        self._move(kind, pairs[middle:])

    def copy(self, pairs: Pairs) -> None:
        """Page to page, on the device."""
        _check(pairs, self.num_pages, self.num_pages, one_space=True)
        with torch.inference_mode():
            for sources, targets in self._pieces(pairs):
                read, written = self._index(sources), self._index(targets)
                for part in self._parts:
                    part.index_copy_(2, written, part.index_select(2, read))

    def swap_out(self, pairs: Pairs) -> None:
        """Page to host page."""
        _check(pairs, self.num_pages, self.num_host_pages)
        with torch.inference_mode():
            for sources, targets in self._pieces(pairs):
                staging = self._staging(len(sources))
                read = self._index(sources)
                for part, words in self._split(staging):
                    words.copy_(part.index_select(2, read).permute(2, 0, 1, 3))
                for host, i, j in self._host_runs(targets):
                    host.copy_(staging[i:j], non_blocking=True)

    def swap_in(self, pairs: Pairs) -> None:
        """Host page to page."""
        _check(pairs, self.num_host_pages, self.num_pages)
        with torch.inference_mode():
            for sources, targets in self._pieces(pairs):
                staging = self._staging(len(sources))
                for host, i, j in self._host_runs(sources):
                    staging[i:j].copy_(host, non_blocking=True)
                written = self._index(targets)
                for part, words in self._split(staging):
                    part.index_copy_(2, written, words.permute(1, 2, 0, 3))

    def poison(self, pages: Sequence[int]) -> None:
        """Fill pages with NaN, those of 8 bits by their scales. For tests: what was read after all shows."""
        with torch.inference_mode():
            for layer in self.layers:
                if layer.key_scales is not None and layer.value_scales is not None:
                    filled = [layer.key_scales, layer.value_scales]
                else:
                    filled = [layer.keys, layer.values]
                for tensor in filled:
                    tensor.index_fill_(0, self._index(pages), float("nan"))

    def seconds_per_page_moved(self) -> float | None:
        """Of a page's way out and back in: median of a few timed moves. None without host pages.

        Overwrites the first host pages, and no page of the device.
        """
        count = min(self.num_pages, self.num_host_pages, _TIMED_PAGES)
        if not count:
            return None
        pairs = [(i, i) for i in range(count)]
        seconds = []
        for _ in range(6):
            start = time.perf_counter()
            self.swap_out(pairs)
            self.swap_in(pairs)
            if self._parts[0].device.type == "cuda":
                torch.cuda.synchronize(self._parts[0].device)
            seconds.append((time.perf_counter() - start) / count)
        return statistics.median(seconds[1:])  # the first one also pays for fresh memory

    def _pieces(self, pairs: Pairs) -> Iterator[tuple[list[int], list[int]]]:
        """Sources and targets, few enough at once for `STAGING_BYTES`."""
        most = max(1, STAGING_BYTES // self.page_bytes)
        for i in range(0, len(pairs), most):
            piece = pairs[i : i + most]
            yield [source for source, _ in piece], [target for _, target in piece]

    def _index(self, pages: Sequence[int]) -> Tensor:
        return staged_ints(pages, self._parts[0].device)

    def _staging(self, count: int) -> Tensor:
        """Room on the device for pages as they lie on the host."""
        assert self._host is not None
        return self._parts[0].new_empty((count, *self._host.shape[1:]))

    def _split(self, staging: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each part, and its words `[count, layers, 2, words]` in the staging tensor."""
        widths = [part.shape[3] for part in self._parts]
        yield from zip(self._parts, torch.split(staging, widths, dim=3), strict=True)

    def _host_runs(self, slots: list[int]) -> Iterator[tuple[Tensor, int, int]]:
        """Host pages that follow each other, as one piece, and which of `slots` they are: `i` to `j`."""
        assert self._host is not None
        i = 0
        while i < len(slots):
            j = i + 1
            while j < len(slots) and slots[j] == slots[j - 1] + 1:
                j += 1
            yield self._host[slots[i] : slots[i] + j - i], i, j
            i = j


def grouped(moves: Iterable[Move]) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    """Runs of neighbours of one kind that may all be read before any is written."""
    kind, pairs, sources, targets = "", list[tuple[int, int]](), set[int](), set[int]()
    for move in moves:
        clash = move.target in targets or (
            move.kind == "copy" and (move.source in targets or move.target in sources)
        )
        if pairs and (move.kind != kind or clash):
            yield kind, pairs
            pairs, sources, targets = [], set(), set()
        kind = move.kind
        pairs.append((move.source, move.target))
        sources.add(move.source)
        targets.add(move.target)
    if pairs:
        yield kind, pairs


def _check(pairs: Pairs, num_sources: int, num_targets: int, *, one_space: bool = False) -> None:
    sources, targets = {source for source, _ in pairs}, {target for _, target in pairs}
    if len(targets) < len(pairs) or (one_space and sources & targets):
        raise ValueError(f"a page is written twice, or read and written, in {list(pairs)}")
    for pages, number in ((sources, num_sources), (targets, num_targets)):
        if pages and not (min(pages) >= 0 and max(pages) < number):
            raise IndexError(f"there are {number} pages, not all of {sorted(pages)}")


def dtype_name(storage: torch.dtype) -> str:
    """`bfloat16`, `float16`, `float32`, `int8` or `fp8`."""
    names = {dtype: name for name, dtype in EIGHT_BITS.items()}
    return names.get(storage, str(storage).removeprefix("torch."))
