"""KVCache: moves of pages are exact to the bit and touch nothing else; memory is counted as it is taken."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.cache import KVCache
from engine.checkpoint import Checkpoint
from engine.config import EngineConfig
from engine.memory import bytes_per_page, fitting_host_pages, fitting_pages
from engine.model_config import ModelConfig
from engine.plan import Move
from engine.sampling_params import InvalidParameter
from tests.support.tiny import write_tiny_llama

KINDS: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": torch.float32},
    "bf16": {"dtype": torch.bfloat16},
    "fp32 int8": {"dtype": torch.float32, "storage": torch.int8},
    "bf16 int8": {"dtype": torch.bfloat16, "storage": torch.int8},
    "bf16 fp8": {"dtype": torch.bfloat16, "storage": torch.float8_e4m3fn},
}
PAGES, HOST_PAGES, PAGE_SIZE = 12, 7, 32


@pytest.fixture
def config(tmp_path: Path) -> ModelConfig:
    return Checkpoint.open(str(write_tiny_llama(tmp_path, num_layers=3))).config


@pytest.fixture(params=KINDS)
def cache(request: pytest.FixtureRequest, config: ModelConfig) -> KVCache:
    """Every page full of random bits, NaN of all kinds among them."""
    made = KVCache.allocate(
        config, PAGES, PAGE_SIZE, device="cpu", num_host_pages=HOST_PAGES, **KINDS[request.param]
    )
    for tensor in tensors(made):
        tensor.view(torch.uint8).random_(0, 256, generator=torch.Generator().manual_seed(tensor.numel()))
    return made


def tensors(cache: KVCache) -> list[Tensor]:
    found = []
    for layer in cache.layers:
        found += [layer.keys, layer.values]
        found += [part for part in (layer.key_scales, layer.value_scales) if part is not None]
    return found


def bits(cache: KVCache) -> Tensor:
    """All that each page holds, `[pages, bytes]`."""
    return torch.cat(
        [tensor.view(torch.uint8).reshape(PAGES, -1) for tensor in tensors(cache)], dim=1
    ).clone()


def test_a_cache_is_made_as_the_contract_says(cache: KVCache, config: ModelConfig) -> None:
    heads, dim = config.num_kv_heads, config.head_dim
    assert len(cache.layers) == config.num_layers
    for layer in cache.layers:
        assert layer.keys.shape == (PAGES, heads, dim, PAGE_SIZE)
        assert layer.values.shape == (PAGES, heads, PAGE_SIZE, dim)
        for scales in (layer.key_scales, layer.value_scales):
            assert (scales is None) == (cache.dtype not in ("int8", "fp8"))
            assert scales is None or scales.shape == (PAGES, heads, PAGE_SIZE)
    assert all(tensor.is_contiguous() for tensor in tensors(cache))
    assert bits(cache).shape[1] == cache.page_bytes
    assert cache.page_bytes == bytes_per_page(config, PAGE_SIZE, cache.layers[0].keys.dtype)


def test_keys_lie_by_token_where_the_kernels_want_them_so(config: ModelConfig) -> None:
    made = KVCache.allocate(config, 3, PAGE_SIZE, dtype=torch.float32, device="cpu", keys_by_token=True)
    for number, layer in enumerate(made.layers):
        assert layer.keys.shape == (3, config.num_kv_heads, config.head_dim, PAGE_SIZE)
        assert layer.keys.transpose(2, 3).is_contiguous()
        layer.keys[:] = float(number)
        layer.values[:] = -1.0
    made.poison([1])
    made.copy([(1, 0)])
    for number, layer in enumerate(made.layers):
        assert layer.keys[:2].isnan().all()
        assert (layer.keys[2] == number).all()


def test_pages_are_copied_exactly(cache: KVCache) -> None:
    wanted = bits(cache)
    cache.copy([(3, 0), (3, 11), (5, 4), (7, 8)])
    wanted[[0, 11, 4, 8]] = wanted[[3, 3, 5, 7]]
    assert torch.equal(bits(cache), wanted)
    cache.copy([])
    assert torch.equal(bits(cache), wanted)


def test_pages_come_back_from_the_host_exactly(cache: KVCache) -> None:
    before = bits(cache)
    cache.swap_out([(2, 5), (9, 6), (0, 1)])
    assert torch.equal(bits(cache), before)
    cache.poison([0, 2, 9])
    wanted = bits(cache)
    cache.swap_in([(6, 1), (1, 9), (5, 3)])
    wanted[[1, 9, 3]] = before[[9, 0, 2]]
    assert torch.equal(bits(cache), wanted)


def test_host_pages_keep_what_they_hold(cache: KVCache) -> None:
    before = bits(cache)
    cache.swap_out([(page, page) for page in range(HOST_PAGES)])
    cache.swap_out([(11, 3), (8, 0)])
    cache.poison(range(PAGES))
    for _ in range(2):  # a host page may be read again
        cache.swap_in([(host, HOST_PAGES - 1 - host) for host in range(HOST_PAGES)])
        held = before[[8, 1, 2, 11, 4, 5, 6]]
        assert torch.equal(bits(cache)[:HOST_PAGES], held.flip(0))
    cache.swap_in([(4, 0), (4, 9)])
    assert torch.equal(bits(cache)[[0, 9]], before[[4, 4]])


MOVES = [
    *(Move("out", page, host) for host, page in enumerate((2, 9, 0, 4))),
    *(Move("copy", 11, page) for page in (2, 9, 0)),
    Move("copy", 2, 4),
    Move("in", 3, 11),
    *(Move("in", host, 5 + host) for host in range(3)),
]


def test_moves_that_find_no_memory_are_made_fewer_at_a_time(
    cache: KVCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or, where there is none for a single page, when there is some: none is lost, and none is made twice."""
    before, outer, most = bits(cache), KVCache._index, 0

    def narrow(cache: KVCache, pages: Sequence[int]) -> Tensor:
        if len(pages) > most:
            raise torch.OutOfMemoryError("none is left")
        return outer(cache, pages)

    monkeypatch.setattr(KVCache, "_index", narrow)
    left = list(MOVES)
    with pytest.raises(torch.OutOfMemoryError):
        cache.move(left)
    assert left == MOVES
    most = 1
    cache.move(left)
    assert left == []
    wanted = before.clone()
    wanted[[2, 9, 0, 4]] = before[11]
    wanted[[11, 5, 6, 7]] = before[[4, 2, 9, 0]]
    assert torch.equal(bits(cache), wanted)


def test_long_moves_go_in_pieces(cache: KVCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.cache.STAGING_BYTES", 2 * cache.page_bytes + 1)
    wanted = bits(cache)
    cache.swap_out([(page, HOST_PAGES - 1 - page) for page in range(HOST_PAGES)])
    cache.swap_in([(host, host + 5) for host in range(HOST_PAGES)])
    wanted[5:12] = wanted[:7].flip(0)
    assert torch.equal(bits(cache), wanted)
    cache.copy([(11, page) for page in range(5)])
    wanted[:5] = wanted[11]
    assert torch.equal(bits(cache), wanted)


@pytest.mark.parametrize("cache", ["bf16 int8"], indirect=True)
def test_moves_that_make_no_sense_are_refused(cache: KVCache) -> None:
    before = bits(cache)
    for pairs in ([(1, 2), (3, 2)], [(1, 2), (2, 3)], [(4, 4)]):
        with pytest.raises(ValueError, match="written twice"):
            cache.copy(pairs)
    for pairs in ([(0, PAGES)], [(PAGES, 0)], [(-1, 0)], [(0, -1)]):
        with pytest.raises(IndexError):
            cache.copy(pairs)
    for pairs in ([(0, HOST_PAGES)], [(PAGES, 0)], [(0, -1)]):
        with pytest.raises(IndexError):
            cache.swap_out(pairs)
    for pairs in ([(HOST_PAGES, 0)], [(0, PAGES)], [(-1, 0)]):
        with pytest.raises(IndexError):
            cache.swap_in(pairs)
    assert torch.equal(bits(cache), before)


def test_poisoned_pages_are_nan(cache: KVCache) -> None:
    before, poisoned = bits(cache), [1, 10]
    cache.poison(poisoned)
    for layer in cache.layers:
        scaled = layer.key_scales is not None
        for tensor in (layer.key_scales, layer.value_scales) if scaled else (layer.keys, layer.values):
            assert tensor is not None
            assert tensor[poisoned].isnan().all()
    others = [page for page in range(PAGES) if page not in poisoned]
    assert torch.equal(bits(cache)[others], before[others])


@pytest.mark.parametrize("cache", ["fp32", "bf16 int8"], indirect=True)
def test_timing_moves_changes_no_page(cache: KVCache, config: ModelConfig) -> None:
    before = bits(cache)
    seconds = cache.seconds_per_page_moved()
    assert seconds is not None
    assert seconds > 0
    assert torch.equal(bits(cache), before)
    without = KVCache.allocate(config, 2, 16, dtype=torch.float32, device="cpu")
    assert without.seconds_per_page_moved() is None


def test_memory_that_cannot_be_had_is_named(config: ModelConfig) -> None:
    sizes: dict[str, Any] = {"page_size": 16, "dtype": torch.float32, "device": "cpu"}
    with pytest.raises(InvalidParameter) as caught:
        KVCache.allocate(config, 2, num_host_pages=2**48, **sizes)
    assert caught.value.param == "swap_space_bytes"
    with pytest.raises(InvalidParameter) as caught:
        KVCache.allocate(config, 2**48, **sizes)
    assert caught.value.param == "kv_cache_memory_bytes"


@pytest.mark.parametrize("storage", [torch.int8, torch.float8_e4m3fn])
def test_eight_bits_hold_nearly_twice_the_tokens(tmp_path: Path, storage: torch.dtype) -> None:
    config = Checkpoint.open(str(write_tiny_llama(tmp_path, head_dim=64))).config
    sizes: dict[str, Any] = {
        "page_size": 16,
        "device": "cpu",
        "max_num_seqs": 10**6,
        "max_model_len": 512,
        "max_num_batched_tokens": 512,
    }
    plain = fitting_pages(config, storage=torch.bfloat16, memory_bytes=10**8, **sizes)
    assert plain * bytes_per_page(config, 16, torch.bfloat16) <= 10**8
    eight = fitting_pages(config, storage=storage, memory_bytes=10**8, **sizes)
    assert eight * bytes_per_page(config, 16, storage) <= 10**8
    assert 1.9 <= eight / plain < 2


def test_host_pages_follow_the_settings() -> None:
    def pages(mode: Any = "auto", space: int | None = None, device: str = "cpu", usable: int = 50) -> int:
        return fitting_host_pages(1000, usable=usable, mode=mode, device=device, swap_space_bytes=space)

    assert [pages(), pages(space=0), pages(space=999)] == [0, 0, 0]
    assert [pages(space=7999), pages("swap", 7999), pages("recompute", 7999)] == [7, 7, 0]
    assert [pages(space=10**9), pages(device="cuda"), pages("recompute", device="cuda")] == [50, 50, 0]
    assert pages(device="cuda", usable=10**12) <= 2**33 // 1000
    for space in (None, 999):
        with pytest.raises(InvalidParameter) as caught:
            pages("swap", space)
        assert caught.value.param == "swap_space_bytes"


@pytest.mark.parametrize(
    "settings", [{"preemption_mode": "swap", "swap_space_bytes": 0}, {"swap_space_bytes": -1}]
)
def test_swap_settings_that_cannot_work_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidParameter) as caught:
        EngineConfig(model="any", **settings)
    assert caught.value.param == "swap_space_bytes"
