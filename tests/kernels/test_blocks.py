"""All blocks as one operation: its bits, and those it stores, are those of the operations one after another."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import Attention, HeadNorms, Kernels, PagedKV, SharedPrefixes, kernels_for
from kernels.blocks import BlockParts, FusedBlocks, Product
from kernels.reference import KERNELS as REFERENCE
from tests.support.paged import empty_cache

CPU = kernels_for("cpu", "cpu")
PAGE = 16
Rotation = tuple[Tensor, Tensor]
CONTEXTS = [(1, 1), (1, 300), (5, 5), (7, 40), (1, 0)]  # queries and tokens of each row; 0: padding


def product(outputs: int, inputs: int, dtype: torch.dtype, bias: bool) -> Product:
    assert CPU.pack is not None
    weight = (torch.randn(outputs, inputs) * inputs**-0.5).to(dtype)
    return Product(CPU.pack(weight), torch.randn(outputs).to(dtype) if bias else None)


def block(
    dtype: torch.dtype,
    hidden: int = 72,
    heads: int = 6,
    kv_heads: int = 2,
    dim: int = 24,
    inner: int = 100,
    rotary_dim: int = 24,
    bias: bool = False,
    normed: bool = False,
    **changes: Any,
) -> BlockParts:
    def vector(width: int) -> Tensor:
        return torch.randn(width).to(dtype)

    mixed = heads * dim
    parts = BlockParts(
        attention_norm=vector(hidden),
        mlp_norm=vector(hidden),
        eps=1e-5,
        offset=0.0,
        heads=heads,
        kv_heads=kv_heads,
        dim=dim,
        head_norms=HeadNorms(vector(dim), vector(dim), 1e-6, 0.5) if normed else None,
        rotary_dim=rotary_dim,
        rotation=0,
        how=Attention(dim**-0.5),
        activation="silu",
        qkv=product(mixed + 2 * kv_heads * dim, hidden, dtype, bias),
        out=product(hidden, mixed, dtype, bias),
        gate_up=product(2 * inner, hidden, dtype, bias),
        down=product(hidden, inner, dtype, bias),
    )
    return replace(parts, **changes)


def one_by_one(
    kernels: Kernels,
    blocks: list[BlockParts],
    residual: Tensor,
    rotations: list[Rotation],
    caches: list[PagedKV],
    slots: Tensor,
    *rows: Any,
) -> tuple[Tensor, Tensor]:
    """What `kernels.blocks` says, operation by operation; rows: as `paged_attention` takes them."""
    matmul = kernels.matmul
    assert matmul is not None
    tokens, x = residual.shape[0], torch.empty(0)
    for i, (one, cache) in enumerate(zip(blocks, caches, strict=True)):
        shift = one.attention_norm, one.eps, one.offset
        if i:
            x, residual = kernels.add_rms_norm(x, residual, *shift)
        else:
            x = kernels.rms_norm(residual, *shift)
        qkv = matmul(x, *one.qkv).view(tokens, one.heads + 2 * one.kv_heads, one.dim)
        q, k, v = qkv.split_with_sizes((one.heads, one.kv_heads, one.kv_heads), dim=1)
        if (norms := one.head_norms) is not None:
            (q, k) = (
                kernels.rms_norm(heads.reshape(-1, one.dim), weight, norms.eps, norms.offset).view(
                    heads.shape
                )
                for heads, weight in ((q, norms.q), (k, norms.k))
            )
        if one.rotary_dim:
            kernels.rope(q[..., : one.rotary_dim], k[..., : one.rotary_dim], *rotations[one.rotation])
        kernels.store_kv(k, v, cache, slots)
        page_table, query_start, context_lens, shared = rows
        mixed = kernels.paged_attention(q, cache, page_table, query_start, context_lens, one.how, shared)
        x = matmul(mixed.view(tokens, -1), *one.out)
        x, residual = kernels.add_rms_norm(x, residual, one.mlp_norm, one.eps, one.offset)
        x = matmul(kernels.act_mul(matmul(x, *one.gate_up), one.activation), *one.down)
    return x, residual


def fused(blocks: list[BlockParts]) -> FusedBlocks:
    assert CPU.fuse is not None
    return CPU.fuse(blocks)


class Step:
    """Rows on pages of their own, or on shared first ones; `padding` tokens behind those of all rows."""

    def __init__(
        self,
        blocks: list[BlockParts],
        rows: list[tuple[int, int]],
        storage: torch.dtype | None,
        padding: int = 0,
    ) -> None:
        dtype, hidden = blocks[0].attention_norm.dtype, blocks[0].attention_norm.shape[0]
        self.page_table = torch.arange(len(rows) * 20, dtype=torch.int32).view(len(rows), 20)
        counts = [count for count, _ in rows]
        self.query_start: Tensor | None = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0).int()
        self.context_lens = torch.tensor([context for _, context in rows], dtype=torch.int32)
        self.shared: SharedPrefixes | None = None
        at = [
            -1 if context == 0 else (row * 20 * PAGE + context - count + i)
            for row, (count, context) in enumerate(rows)
            for i in range(count)
        ]
        self.slots = torch.tensor([*at, *[-1] * padding], dtype=torch.int64)
        tokens = len(self.slots)
        self.residual = torch.randn(tokens, hidden).to(dtype)
        rotary_dim = max(one.rotary_dim for one in blocks)
        angles = [torch.rand(tokens, rotary_dim // 2) * 6 for _ in range(2)]
        self.rotations = [(angle.cos(), angle.sin()) for angle in angles]
        self.caches = [self._filled(one, len(rows), dtype, storage) for one in blocks]

    def _filled(self, one: BlockParts, rows: int, dtype: torch.dtype, storage: torch.dtype | None) -> PagedKV:
        scaled = storage is not None
        cache = empty_cache(20 * rows, one.kv_heads, one.dim, PAGE, storage or dtype, scaled=scaled)
        slots = torch.arange(20 * rows * PAGE)
        k, v = (torch.randn(len(slots), one.kv_heads, one.dim).to(dtype) for _ in range(2))
        REFERENCE.store_kv(k, v, cache, slots)
        return cache

    def arguments(self) -> tuple[Any, ...]:
        """Of a call, whose changes stay in them."""
        caches = [
            PagedKV(
                *(None if part is None else part.clone() for part in (getattr(c, f.name) for f in fields(c)))
            )  # type: ignore[arg-type]
            for c in self.caches
        ]
        rows = self.page_table, self.query_start, self.context_lens, self.shared
        return self.residual.clone(), self.rotations, caches, self.slots, *rows


def assert_same(blocks: list[BlockParts], step: Step) -> tuple[Tensor, Tensor]:
    """Results and caches, bit by bit."""
    wanted, found = step.arguments(), step.arguments()
    expected = one_by_one(CPU, blocks, *wanted)
    made = fused(blocks)(*found)
    for one, other in zip(made, expected, strict=True):
        assert one.isfinite().all()
        assert torch.equal(one, other)
    for cache, other_cache in zip(found[2], wanted[2], strict=True):
        for field in fields(cache):
            left, right = getattr(cache, field.name), getattr(other_cache, field.name)
            assert (left is None) == (right is None)
            assert left is None or torch.equal(left.view(torch.uint8), right.view(torch.uint8))
    return made


SLIDING = Attention(0.2, window=30, softcap=20.0)
SINKS_AND_WINDOW = Attention(0.2, window=30, slopes=torch.rand(6), sinks=torch.linspace(5, -1, 6))
KINDS: dict[str, list[dict[str, Any]]] = {
    "SmolLM2": [{"hidden": 576, "heads": 9, "kv_heads": 3, "dim": 64, "inner": 1536, "rotary_dim": 64}] * 2,
    "partial rotary, biases": [{"rotary_dim": 8, "bias": True}] * 3,
    "head norms": [{"normed": True, "activation": "gelu_tanh"}] * 2,
    "windows in every other": [{}, {"how": SLIDING, "rotation": 1, "offset": 1.0}],
    "no rotation in one": [{"rotary_dim": 0, "how": Attention(0.2, slopes=torch.rand(6))}, {}],
    "clamped gates": [{"activation": "swiglu_oai", "bias": True}] * 2,
    "sinks": [
        {"how": Attention(0.2, sinks=torch.linspace(-2, 4, 6))},
        {"how": SINKS_AND_WINDOW, "rotation": 1},
    ],
    "other inner widths": [{"inner": 37}, {"inner": 300}],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [CONTEXTS[1:2], CONTEXTS[:4]], ids=["one token", "chunks"])
def test_it_does_what_the_operations_do(
    kind: str, rows: list[tuple[int, int]], dtype: torch.dtype, cpu_storage: torch.dtype | None
) -> None:
    torch.manual_seed(1)
    blocks = [block(dtype, **changes) for changes in KINDS[kind]]
    assert_same(blocks, Step(blocks, rows, cpu_storage, padding=len(rows) - 1))


@pytest.mark.parametrize("padded", [False, True])
def test_rows_of_one_token_need_no_starts(dtype: torch.dtype, padded: bool) -> None:
    torch.manual_seed(2)
    blocks = [block(dtype) for _ in range(2)]
    step = Step(blocks, [(1, 1), (1, 300), *[(1, 0)] * padded, (1, 17)], None)
    step.query_start = None
    assert_same(blocks, step)


def test_rows_that_share_a_prefix(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    blocks = [block(dtype) for _ in range(2)]
    step = Step(blocks, [(1, 300), (1, 290), (3, 40), (1, 301)], None)
    step.page_table[1, :16] = step.page_table[3, :16] = step.page_table[0, :16]
    step.shared = SharedPrefixes(
        *(torch.tensor(part, dtype=torch.int32) for part in ([256, 256, 0, 256], [0, 1, 3], [0, 3]))
    )
    assert_same(blocks, step)


def test_a_token_does_not_depend_on_its_crowd(dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    blocks = [block(dtype) for _ in range(3)]
    step = Step(blocks, CONTEXTS[:4], None)
    x, residual = assert_same(blocks, step)
    assert step.query_start is not None
    for row, (first, last) in enumerate(zip(step.query_start[:-1], step.query_start[1:], strict=True)):
        own, whole = slice(int(first), int(last)), step.arguments()
        alone = fused(blocks)(
            whole[0][own].clone(),
            [(cos[own], sin[own]) for cos, sin in step.rotations],
            whole[2],
            step.slots[own],
            step.page_table[row : row + 1],
            torch.tensor([0, last - first], dtype=torch.int32),
            step.context_lens[row : row + 1],
        )
        assert torch.equal(alone[0], x[own])
        assert torch.equal(alone[1], residual[own])


def test_threads_change_no_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    blocks = [block(dtype, **KINDS["SmolLM2"][0])]
    step, before, found = Step(blocks, [(1, 300), (30, 200)], None), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(fused(blocks)(*step.arguments()))
    finally:
        torch.set_num_threads(before)
    for x, residual in found[1:]:
        assert torch.equal(x, found[0][0])
        assert torch.equal(residual, found[0][1])


@pytest.mark.parametrize("read", [[12], [0, 1, 13], [5, 5, 0, 12], list(range(13, -1, -1))], ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_what_is_read_is_the_same_without_the_rest(
    dtype: torch.dtype, cpu_storage: torch.dtype | None, read: list[int], count: int
) -> None:
    torch.manual_seed(7)
    blocks = [block(dtype, inner=300) for _ in range(count)]
    step, chosen = Step(blocks, CONTEXTS[:4], cpu_storage), torch.tensor(read)
    everything, whole = assert_same(blocks, step), step.arguments()
    found = fused(blocks)(*whole, chosen)
    for one, other in zip(found, everything, strict=True):
        assert torch.equal(one, other[chosen])
    wanted = step.arguments()
    one_by_one(CPU, blocks, *wanted)
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(whole[2], wanted[2], strict=True))
    assert all(torch.equal(a.values, b.values) for a, b in zip(whole[2], wanted[2], strict=True))
    with pytest.raises(ValueError, match=r"read \[W\] int64"):
        fused(blocks)(*step.arguments(), torch.arange(15))


def test_other_caches_may_come() -> None:
    torch.manual_seed(6)
    blocks = [block(torch.bfloat16)]
    step, operation = Step(blocks, CONTEXTS[:4], None), fused(blocks)
    first, second = step.arguments(), Step(blocks, CONTEXTS[:4], torch.int8).arguments()
    for arguments in (first, second, first):
        again = (step.residual.clone(), *arguments[1:])
        expected = one_by_one(CPU, blocks, step.residual.clone(), *arguments[1:])
        assert torch.equal(operation(*again)[0], expected[0])


def test_no_tokens_are_no_work() -> None:
    blocks = [block(torch.float32)]
    x, residual = fused(blocks)(*Step(blocks, [], None).arguments())
    assert x.shape == residual.shape == (0, 72)


def test_the_reference_has_no_use_for_it() -> None:
    assert REFERENCE.fuse is None


def test_what_breaks_the_contract_is_refused() -> None:
    good = block(torch.bfloat16)
    for wrong in (
        {"heads": 5},
        {"attention_norm": torch.ones(72)},
        {"mlp_norm": torch.ones(71).bfloat16()},
        {"rotary_dim": 25},
        {"rotation": 2},
        {"down": good.out},
        {"how": Attention(1.0, slopes=torch.ones(5))},
        {"how": Attention(1.0, sinks=torch.ones(6).double())},
    ):
        with pytest.raises(ValueError, match="contract broken"):
            fused([replace(good, **wrong)])
    with pytest.raises(ValueError, match="each of one width"):
        fused([good, block(torch.bfloat16, rotary_dim=8)])
    step = Step([good], CONTEXTS[:4], None)
    for place, value in ((0, step.residual.float()), (1, []), (2, []), (3, step.slots[1:]), (6, step.slots)):
        arguments = list(step.arguments())
        arguments[place] = value
        with pytest.raises(ValueError, match="contract broken"):
            fused([good])(*arguments)
