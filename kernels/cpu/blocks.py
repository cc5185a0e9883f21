"""All blocks of a decoder by one call of C (`blocks.h`).

Owns the structures that C reads: those of the weights are written once, those of the caches when the caches change,
that of a step each time. Knows no model.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from ctypes import POINTER, Structure, byref, c_float, c_int, c_long, c_void_p

import torch
from torch import Tensor

from kernels import PagedKV, SharedPrefixes
from kernels.blocks import BlockParts, FusedBlocks, Product
from kernels.cpu.matmul import SUFFIXES
from kernels.cpu.tensors import (
    ACTIVATIONS,
    PAGED_SUFFIXES,
    dtypes_of,
    groups_of,
    page_size_of,
    pointers_of,
    require,
    require_per_head,
    require_rows,
    same_dtype,
    single_queries,
)

MOST_ROTATIONS = 2  # as in blocks.h
PARTS = ("qkv", "out", "gate_up", "down")


class _Weights(Structure):
    """`block_weights` of blocks.h."""

    _fields_ = [
        *[(name, c_long) for name in ("heads", "kv_heads", "dim", "rotary_dim", "inner", "activation")],
        *[(name, c_long) for name in ("rotation", "window")],
        *[(name, c_float) for name in ("eps", "offset", "head_eps", "head_offset", "scale", "softcap")],
        *[(name, c_void_p) for name in ("slopes", "sinks", "attention_norm", "q_norm", "k_norm", "mlp_norm")],
        *[(name + kind, c_void_p) for name in PARTS for kind in ("", "_bias")],
    ]


class _Pages(Structure):
    """`block_pages` of blocks.h."""

    _fields_ = [(name, c_void_p) for name in ("keys", "values", "key_scales", "value_scales")]


class _Step(Structure):
    """`block_step` of blocks.h."""

    _fields_ = [
        *[(name, c_long) for name in ("tokens", "rows", "hidden", "page_size", "table_stride", "groups")],
        *[(name, c_void_p) for name in ("slots", "page_table", "query_start", "context_lens")],
        *[(name, c_void_p) for name in ("shared_tokens", "shared_members", "shared_starts")],
        ("rotations", c_void_p * (2 * MOST_ROTATIONS)),
        ("padding", c_long),
        ("read", c_void_p),
        ("num_read", c_long),
    ]


class Fusing:
    """The operation of the contract, `fuse`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._functions = {}
        for key, suffix in PAGED_SUFFIXES.items():
            self._functions[key] = function = getattr(library, f"blocks_{suffix}")
            structures = map(POINTER, (_Weights, _Pages, _Step))
            function.argtypes = (c_long, *structures, *[c_void_p] * 3, c_int)
            function.restype = c_int

    def fuse(self, blocks: Sequence[BlockParts]) -> FusedBlocks:
        return _Blocks(self._functions, blocks)


class _Blocks:
    """A `FusedBlocks`: the weights of all blocks as C reads them, and the caches of the last step."""

    def __init__(
        self,
        functions: Mapping[tuple[torch.dtype, torch.dtype], Callable[..., int]],
        blocks: Sequence[BlockParts],
    ) -> None:
        self._functions = functions
        self._blocks = tuple(blocks)  # keeps what the structures point to
        self._hidden = self._blocks[0].attention_norm.shape[0]
        self._dtype = self._blocks[0].attention_norm.dtype
        self._weights = (_Weights * len(self._blocks))(
            *(_weights_of(block, self._hidden) for block in self._blocks)
        )
        # elements per token: of a block's normed x, then of its q, k, v and what is mixed, or of its inner channels
        self._width = self._hidden + max(
            max((2 * block.heads + 2 * block.kv_heads) * block.dim, 3 * block.down.weight.shape[1])
            for block in self._blocks
        )
        # rotation → how many channels it turns
        self._rotary = {block.rotation: block.rotary_dim for block in self._blocks if block.rotary_dim}
        require(
            all(block.rotary_dim in (0, self._rotary[block.rotation]) for block in self._blocks)
            and all(0 <= rotation < MOST_ROTATIONS for rotation in self._rotary),
            f"fuse: at most {MOST_ROTATIONS} rotations, each of one width",
        )
        self._caches: list[PagedKV] | None = None  # those that `_pages` points to

    def __call__(
        self,
        residual: Tensor,
        rotations: Sequence[tuple[Tensor, Tensor]],
        caches: Sequence[PagedKV],
        slots: Tensor,
        page_table: Tensor,
        query_start: Tensor | None,
        context_lens: Tensor,
        shared: SharedPrefixes | None = None,
        read: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        tokens, rows = residual.shape[0], page_table.shape[0]
        starts = single_queries(tokens) if query_start is None else query_start
        require(
            residual.shape == (tokens, self._hidden)
            and residual.dtype == self._dtype
            and residual.is_contiguous(),
            "blocks: residual [T, hidden] of the weights' dtype",
        )
        require(slots.dtype == torch.int64 and slots.shape == (tokens,), "blocks: slots [T] int64")
        require_rows("blocks", page_table, starts, context_lens)
        num_read = tokens if read is None else read.shape[0]
        require(
            read is None
            or (
                read.dtype == torch.int64 and read.is_contiguous() and read.dim() == 1 and num_read <= tokens
            ),
            "blocks: read [W] int64, at most T",
        )
        if list(caches) != self._caches:
            self._take(caches)
        tokens_shared, members, shared_starts, groups = groups_of(shared, rows)
        step = _Step(
            tokens, rows, self._hidden, self._page_size, page_table.shape[1], groups,
            slots.data_ptr(), page_table.data_ptr(), starts.data_ptr(), context_lens.data_ptr(),
            tokens_shared, members, shared_starts, self._angles(rotations, tokens), query_start is None,
            _pointer(read), num_read,
        )  # fmt: skip
        added = torch.empty_like(residual)
        if tokens == 0:
            return added, residual
        workspace = torch.empty(tokens * self._width, dtype=self._dtype)
        failed = self._run(
            len(self._blocks), self._weights, self._pages, byref(step), residual.data_ptr(), added.data_ptr(),
            workspace.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        if failed:
            raise MemoryError("blocks: no memory for a product's x or attention's work items")
        return added[:num_read], residual[:num_read]

    def _take(self, caches: Sequence[PagedKV]) -> None:
        """Point to other caches than before."""
        require(len(caches) == len(self._blocks), "blocks: one cache per block")
        sizes = {
            page_size_of(cache, block.kv_heads, block.dim)
            for cache, block in zip(caches, self._blocks, strict=True)
        }
        kinds = {
            dtypes_of(block.attention_norm, cache) for cache, block in zip(caches, self._blocks, strict=True)
        }
        require(len(sizes) == len(kinds) == 1, "blocks: caches of one page size and dtype")
        self._pages = (_Pages * len(self._blocks))(*(_Pages(*pointers_of(cache)) for cache in caches))
        self._caches, self._page_size, self._run = list(caches), sizes.pop(), self._functions[kinds.pop()]

    def _angles(self, rotations: Sequence[tuple[Tensor, Tensor]], tokens: int) -> tuple[int, ...]:
        """Where cosines and sines lie, of one rotation after the other."""
        found = [0] * (2 * MOST_ROTATIONS)
        for rotation, channels in self._rotary.items():
            require(rotation < len(rotations), "blocks: a rotation for each that blocks ask for")
            for i, angles in enumerate(rotations[rotation]):
                require(
                    angles.shape == (tokens, channels // 2)
                    and angles.dtype == torch.float32
                    and angles.is_contiguous(),
                    "blocks: cos and sin [T, rotary_dim / 2] fp32",
                )
                found[2 * rotation + i] = angles.data_ptr()
        return tuple(found)


def _weights_of(block: BlockParts, hidden: int) -> _Weights:
    """Checked here, once: no step looks at them again."""
    heads, kv_heads, dim, how, norms = block.heads, block.kv_heads, block.dim, block.how, block.head_norms
    inner, mixed = block.down.weight.shape[1], heads * dim
    shapes = ((mixed + 2 * kv_heads * dim, hidden), (hidden, mixed), (2 * inner, hidden), (hidden, inner))
    products: list[Product] = [getattr(block, name) for name in PARTS]
    require(
        all(product.weight.shape == shape for product, shape in zip(products, shapes, strict=True))
        and all(
            bias is None or (bias.shape == weight.shape[:1] and bias.is_contiguous())
            for weight, bias in products
        ),
        "fuse: qkv [(hq + 2 hk) d, hidden], out [hidden, hq d], gate_up [2 I, hidden], down [hidden, I]",
    )
    vectors = [block.attention_norm, block.mlp_norm, *([norms.q, norms.k] if norms is not None else ())]
    widths = [hidden, hidden, dim, dim]
    require(
        all(
            vector.shape == (width,) and vector.is_contiguous()
            for vector, width in zip(vectors, widths, strict=False)
        ),
        "fuse: norms [hidden], of heads [d]",
    )
    biases = [product.bias for product in products if product.bias is not None]
    same_dtype(*vectors, *biases, *(product.weight.words for product in products))
    require(
        block.attention_norm.dtype in SUFFIXES
        and heads % kv_heads == 0
        and block.rotary_dim % 2 == 0
        and block.rotary_dim <= dim,
        "fuse: bf16 or fp32, hq a multiple of hk, rotary_dim even and at most d",
    )
    require_per_head("fuse", "slopes", how.slopes, heads)
    require_per_head("fuse", "sinks", how.sinks, heads)
    return _Weights(
        heads, kv_heads, dim, block.rotary_dim, inner, ACTIVATIONS[block.activation], block.rotation, how.window or 0,
        block.eps, block.offset, norms.eps if norms else 0.0, norms.offset if norms else 0.0,
        how.scale, how.softcap or 0.0, _pointer(how.slopes), _pointer(how.sinks), _pointer(block.attention_norm),
        _pointer(norms.q if norms else None), _pointer(norms.k if norms else None), _pointer(block.mlp_norm),
        *(_pointer(part) for weight, bias in products for part in (weight.words, bias)),
    )  # fmt: skip


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
