"""Memory: how many pages fit, on the device and on the host.

Owns the arithmetic of bytes and what is free. Knows no tensors' insides (`cache`) and no owners of pages.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import torch

from engine.model_config import ModelConfig
from engine.sampling_params import InvalidParameter

FREE_MEMORY_FRACTION = {"cpu": 0.5, "cuda": 0.9}  # a CPU's memory is shared with everyone else on it
MAX_SWAP_BYTES = 2**33  # of host memory that nobody asked for
PAGE_SIZES = {"cpu": 16, "cuda": 64}  # larger ones are read faster there, measured on an H200


def bytes_per_page(config: ModelConfig, page_size: int, storage: torch.dtype) -> int:
    """All layers, K and V, and the scales that 8 bits need."""
    scales = config.kv_scale_bytes_per_token if storage.itemsize == 1 else 0
    return page_size * (config.kv_bytes_per_token(storage.itemsize) + scales)


def token_budget(device: str) -> int:
    """Tokens of one step: as many as keep the device at its rate."""
    if torch.device(device).type != "cuda":
        return 2048
    return 16384 if torch.cuda.get_device_properties(device).total_memory >= 70 * 2**30 else 8192


def usable_pages(page_size: int, *, max_num_seqs: int, max_model_len: int) -> int:
    """What as many sequences of full length occupy as may run at once."""
    return max_num_seqs * -(-max_model_len // page_size)


def fitting_pages(
    config: ModelConfig,
    *,
    page_size: int,
    storage: torch.dtype,
    device: str,
    max_num_seqs: int,
    max_model_len: int,
    max_num_batched_tokens: int,
    memory_bytes: int | None,
    scratch_bytes: int = 0,
) -> int:
    """Pages within `memory_bytes` or a fraction of what is free; never more than could be used at once.

    `storage` is the dtype that is stored; `scratch_bytes`: of the largest weight that a step makes plain. Raises
    `InvalidParameter` when not even one page fits.
    """
    page_bytes = bytes_per_page(config, page_size, storage)
    usable = usable_pages(page_size, max_num_seqs=max_num_seqs, max_model_len=max_model_len)
    if memory_bytes is None:
        kind = torch.device(device).type
        memory_bytes = int(free_memory_bytes(device) * FREE_MEMORY_FRACTION[kind])
        if kind == "cuda":  # what a step needs beside the pages: fp64 rows of the sampler, attention scores
            memory_bytes -= max_num_seqs * config.vocab_size * 8 * 5 + 2**30
            memory_bytes -= 2 * scratch_bytes  # graphs have memory of their own
            memory_bytes -= (
                max_num_batched_tokens * (config.hidden_size * 8 + config.intermediate_size * 4) * 2
            )
    num_pages = min(memory_bytes // page_bytes, usable)
    if num_pages < 1:
        raise InvalidParameter(
            "kv_cache_memory_bytes", f"{memory_bytes} bytes hold no page; one needs {page_bytes}"
        )
    return num_pages


def fitting_host_pages(
    page_bytes: int,
    *,
    usable: int,
    mode: Literal["auto", "recompute", "swap"],
    device: str,
    swap_space_bytes: int | None,
) -> int:
    """Host pages within `swap_space_bytes`, or a quarter of the free host memory for a GPU and none for a CPU,
    whose pages are host memory already; never more than `usable`, and none where pages are only recomputed.

    Raises `InvalidParameter` when `mode` is swap and not even one page fits.
    """
    if mode == "recompute":
        return 0
    if swap_space_bytes is None:
        on_gpu = torch.device(device).type == "cuda"
        swap_space_bytes = min(free_memory_bytes("cpu") // 4, MAX_SWAP_BYTES) if on_gpu else 0
    num_pages = min(swap_space_bytes // page_bytes, usable)
    if mode == "swap" and num_pages < 1:
        raise InvalidParameter(
            "swap_space_bytes", f"{swap_space_bytes} bytes hold no page to swap; one needs {page_bytes}"
        )
    return num_pages


def free_memory_bytes(device: str) -> int:
    """What this process may still take: of the GPU, or of the machine and the control group it lives in."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    group = Path("/sys/fs/cgroup")  # version 2; an unlimited group says "max"
    limit, used = _lines(group / "memory.max"), _lines(group / "memory.current")
    if limit and used and limit[0].isdigit() and used[0].isdigit():
        # the page cache counts as used and is given back on demand
        cached = (line.split() for line in _lines(group / "memory.stat"))
        reclaimable = sum(int(n) for name, n in cached if name in ("active_file", "inactive_file"))
        free = min(free, max(int(limit[0]) - int(used[0]) + reclaimable, 0))
    return free


def _lines(path: str | Path) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
