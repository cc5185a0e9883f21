"""What the triton set promises beyond the suite that all sets share: in its interpreter, with no GPU at hand."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import Attention, Kernels, PagedKV, kernels_for
from kernels.gpu import launch
from kernels.gpu.splits import split_of, split_start, splits_for
from kernels.reference import KERNELS as REFERENCE
from tests.support.close import assert_close
from tests.support.hopping import triton_kernels
from tests.support.paged import Paged, paged
from tests.support.tree import ROOT

TRITON = triton_kernels()


def in_a_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**env, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


WITHOUT_A_GPU = """
import sys
from kernels import kernels_for
kernels_for("cpu")
assert not {"triton", "kernels.gpu"} & set(sys.modules), "loaded unasked"
try:
    kernels_for("cpu", "triton")
except ValueError as error:
    print(error)
"""


def test_a_cpu_without_the_interpreter_is_refused_and_nobody_loads_triton_unasked() -> None:
    done = in_a_process(WITHOUT_A_GPU)
    assert done.returncode == 0, done.stderr
    assert "TRITON_INTERPRET=1" in done.stdout


def test_without_triton_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"nightpress\[gpu\]"):
        kernels_for("cpu", "triton")


@pytest.mark.parametrize(
    ("capability", "hip", "quantised"),
    [((7, 5), None, None), ((9, 0), "6.0", None), ((8, 0), None, 1), ((8, 9), None, 2), ((10, 0), None, 2)],
)
def test_what_a_gpu_can_run(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], hip: str | None, quantised: int | None
) -> None:
    """fp8 needs hardware that converts it; `auto` takes the set where it can run."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    if quantised is None:
        with pytest.raises(ValueError, match="triton kernels"):
            kernels_for("cuda", "triton")
        assert kernels_for("cuda") is REFERENCE
    else:
        found = kernels_for("cuda", "triton")
        assert found.name == "triton"
        assert found.quantised == (torch.int8, torch.float8_e4m3fn)[:quantised]
        assert kernels_for("cuda").name == "triton"


def test_splits_tile_every_context() -> None:
    """In the words of the device and of the host: no gap, no overlap, and few of them."""
    starts = [plain(split_start, split) for split in range(27)]
    lengths = [end - start for start, end in pairwise(starts)]
    assert starts[0] == 0
    assert lengths == [512] * 16 + [2048] * 4 + [4096] * 4 + [8192] * 2
    assert splits_for(131_072) == 32
    for split, (start, end) in enumerate(pairwise(starts)):
        assert splits_for(start) == split
        assert splits_for(start + 1) == splits_for(end) == split + 1
        if split > 13:
            assert plain(split_of, start) == plain(split_of, end - 1) == split


def plain(function: Any, number: int) -> int:
    """What a function of kernels gives for a number, from a kernel of one program."""
    out = torch.empty(1, dtype=torch.int32, device="cuda" if torch.cuda.is_available() else "cpu")
    probe[(1,)](out, number, FUNCTION=function)
    return int(out)


@triton.jit
def probe(out, number, FUNCTION: tl.constexpr):  # noqa: N803
    tl.store(out, FUNCTION(number))


ROWS = [(3, 600), (1, 530), (1, 1), (20, 530), (0, 9), (1, 512), (2, 1025)]


def long_contexts(dtype: torch.dtype, how: Attention | None, storage: torch.dtype | None = None) -> Paged:
    """Contexts over one, two and three splits, at their ends too."""
    page_size = 64 if dtype == torch.bfloat16 else 32
    return paged(
        ROWS, heads=3, kv_heads=1, dim=32, page_size=page_size, dtype=dtype, storage=storage, how=how
    )


OPTIONS = Attention(0.2, window=520, softcap=2.0, sinks=torch.tensor([0.5, 3.0, 7.0]))


@pytest.mark.parametrize("how", [None, OPTIONS], ids=["plain", "options"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.interpreted
def test_a_token_has_the_same_bits_in_any_chunk_and_crowd(dtype: torch.dtype, how: Attention | None) -> None:
    """Also when one kernel computes it as a single query and another one among many."""
    case = long_contexts(dtype, how)
    together = case.run(TRITON)
    for row, (count, _) in enumerate(ROWS):
        for size in (1, 7, 64):
            for first in range(0, count, size):
                same_bits(case, together, row, first, min(first + size, count))


def test_a_token_has_the_same_bits_in_a_few_chunks_and_crowds() -> None:
    how = Attention(0.2, window=600, sinks=torch.tensor([0.5, 3.0, 7.0]))
    case = long_contexts(torch.float32, how)
    together = case.run(TRITON)
    for row, first, last in ((0, 1, 3), (1, 0, 1), (3, 16, 20)):
        same_bits(case, together, row, first, last)


def same_bits(case: Paged, together: Tensor, row: int, first: int, last: int) -> None:
    start = int(case.query_start[row])
    alone = case.only(row, first, last).run(TRITON)
    assert torch.equal(alone, together[start + first : start + last]), (row, first, last)


@pytest.mark.parametrize(("keys", "values"), [(True, False), (False, True)])
@pytest.mark.parametrize("storage", [None, torch.int8])
def test_nan_that_some_queries_of_a_block_see(storage: torch.dtype | None, keys: bool, values: bool) -> None:
    """One token is behind some queries, before the window of others, and seen by those between."""
    how = Attention(0.2, window=3)
    case = paged(
        [(9, 40)], heads=2, kv_heads=1, dim=16, page_size=16, dtype=torch.float32, storage=storage, how=how
    )
    clean = case.run(TRITON)
    found = case.spoil(TRITON, 0, [34], keys=keys, values=values).run(TRITON)
    seeing = [34 - 31 + n for n in range(3)]
    blind = [n for n in range(9) if n not in seeing]
    assert torch.equal(found[blind], clean[blind])
    assert not torch.isfinite(found[seeing]).any()


def test_all_heads_of_one_kv_head_more_than_a_block_holds() -> None:
    """71 query heads on one kv head, as Falcon 7B has."""
    case = paged([(1, 40), (2, 20)], heads=71, kv_heads=1, dim=16, page_size=16, dtype=torch.float32)
    assert_close(case.run(TRITON), case.run(REFERENCE), torch.float32)


@pytest.mark.parametrize("dim", [pytest.param(96, marks=pytest.mark.interpreted), 256])
def test_wide_heads(dim: int) -> None:
    case = paged([(1, 40), (9, 30)], heads=2, kv_heads=1, dim=dim, page_size=16, dtype=torch.bfloat16)
    assert_close(case.run(TRITON), case.run(REFERENCE), torch.bfloat16)


def test_heads_that_are_too_wide_are_refused() -> None:
    case = paged([(1, 4)], heads=1, kv_heads=1, dim=320, page_size=16, dtype=torch.float32)
    with pytest.raises(ValueError, match="256 channels, not 320"):
        case.run(TRITON)


def test_float16() -> None:
    case = paged([(1, 40), (9, 30)], heads=2, kv_heads=1, dim=32, page_size=16, dtype=torch.float16)
    torch.testing.assert_close(case.run(TRITON), case.run(REFERENCE), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("storage", [torch.int8, torch.float8_e4m3fn])
def test_float16_over_a_cache_of_8_bits(storage: torch.dtype) -> None:
    """V may be small, and so may a token's weight: their product is below what float16 can tell from 0."""
    rows = [(1, 300), (6, 200)]
    case = paged(rows, heads=2, kv_heads=1, dim=32, page_size=16, dtype=torch.float16, storage=storage)
    assert case.cache.value_scales is not None
    case.cache.value_scales.mul_(1e-3)
    expected = case.run(REFERENCE).float()
    error = case.run(TRITON).float() - expected
    assert error.norm() < 4e-3 * expected.norm()


def results(kernels: Kernels) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(5, 37, generator=generator)
    case = paged([(2, 600), (1, 600)], heads=3, kv_heads=1, dim=16, page_size=16, dtype=x.dtype, padding=3)
    return [
        case.run(kernels),
        kernels.rms_norm(x, x[0], 1e-5),
        kernels.add_layer_norm(x, x.clone(), x[0], None, 1e-5)[0],
        kernels.act(x, "gelu"),
        kernels.act_mul(x[:, :36], "silu"),
        kernels.softcap(x, 3.0),
        kernels.sample(x, x[0, :5].abs(), torch.arange(5), torch.arange(5)),
    ]


def test_every_element_of_a_result_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is NaN: results, and what splits leave for each other."""
    clean, empty = results(TRITON), torch.empty

    def poisoned(*size: Any, **kind: Any) -> Tensor:
        found = empty(*size, **kind)
        return found.fill_(float("nan")) if found.is_floating_point() else found

    monkeypatch.setattr(torch, "empty", poisoned)
    for one, other in zip(results(TRITON), clean, strict=True):
        assert torch.equal(one, other)


def test_keys_that_lie_otherwise_are_refused() -> None:
    case = paged([(1, 20)], heads=2, kv_heads=1, dim=16, page_size=16, dtype=torch.float32)
    k, slots = torch.randn(1, 1, 16), torch.tensor([3])
    assert TRITON.norm_rope_store is not None
    for call in (
        lambda: TRITON.paged_attention(
            case.q, case.cache, case.page_table, case.query_start, case.context_lens, case.how
        ),
        lambda: TRITON.store_kv(k, k, case.cache, slots),
        lambda: TRITON.norm_rope_store(k.clone(), k, k, None, None, case.cache, slots),
    ):
        with pytest.raises(ValueError, match="keys_by_token"):
            call()


def test_a_pool_of_more_than_two_giga_elements() -> None:
    """Memory that is only reserved: its last pages are written and read, the others never touched."""
    dim, page_size = 64, 16
    pages = 2**31 // (dim * page_size) + 3
    small = paged(
        [(1, 20), (3, 150)],
        heads=2,
        kv_heads=1,
        dim=dim,
        page_size=page_size,
        dtype=torch.float32,
        storage=torch.int8,
    )
    k, v = torch.randn(7, 1, dim), torch.randn(7, 1, dim)
    far = small.cache.keys.shape[0]
    wide = PagedKV(
        torch.empty((pages, 1, page_size, dim), dtype=torch.int8).transpose(2, 3),
        torch.empty((pages, 1, page_size, dim), dtype=torch.int8),
        torch.empty((pages, 1, page_size), dtype=torch.bfloat16),
        torch.empty((pages, 1, page_size), dtype=torch.bfloat16),
    )
    for name in ("keys", "values", "key_scales", "value_scales"):
        getattr(wide, name)[-far:] = getattr(small.cache, name)
    moved = replace(small, cache=wide, page_table=small.page_table + (pages - far))
    slots = torch.arange(7) + (int(small.page_table[1, 0]) * page_size)
    for kernels, case, offset in ((REFERENCE, small, 0), (TRITON, moved, (pages - far) * page_size)):
        kernels.store_kv(k, v, case.cache, slots + offset)
    assert wide.keys[-far:].flatten().numel() + wide.keys[:-far].numel() > 2**31
    assert torch.equal(wide.keys[-far:], small.cache.keys)
    assert torch.equal(wide.values[-far:], small.cache.values)
    assert_close(moved.run(TRITON), small.run(REFERENCE), torch.float32)


def test_no_host_integer_comes_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and lengths stay on the device: the launch is the same for all of them."""
    grids: list[Any] = []

    class Recorded:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *args, **options: grids.append((grid, options))

    for name in ("single", "many", "reduce"):
        monkeypatch.setattr(launch, name, Recorded())
    seen = []
    for counts, lens in (((4, 4, 4), (40, 600, 30)), ((1, 1, 10), (1, 1, 1000))):
        case = paged([(4, 1000)] * 3, heads=4, kv_heads=2, dim=16, page_size=16, dtype=torch.float32)
        case.query_start = torch.tensor([0, *counts]).cumsum(0).int()
        case.context_lens = torch.tensor(lens, dtype=torch.int32)
        grids.clear()
        case.run(TRITON)
        seen.append(list(grids))
    assert len(seen[0]) == 3
    assert seen[0] == seen[1]
