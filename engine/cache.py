"""KVCache: the memory of all pages, and how many of them fit.

Owns the tensors. Knows nothing of who owns which page. Layout as `kernels` writes it down. The memory is
left uninitialised: kernels never read a slot that no context covers.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.request import InvalidParameter

FREE_MEMORY_FRACTION = {"cpu": 0.5, "cuda": 0.9}  # a CPU's memory is shared with everyone else on it


@dataclass(frozen=True, slots=True)
class KVCache:
    keys: list[Tensor]  # per layer [pages, kv_heads, head_dim, page_size]
    values: list[Tensor]  # per layer [pages, kv_heads, page_size, head_dim]

    @classmethod
    def allocate(
        cls, config: ModelConfig, num_pages: int, page_size: int, *, dtype: torch.dtype, device: str
    ) -> KVCache:
        """Raises `InvalidParameter` naming `kv_cache_memory_bytes` when the memory cannot be had."""
        heads, dim = config.num_kv_heads, config.head_dim
        shape = (config.num_layers, 2, num_pages, heads * dim * page_size)
        try:
            memory = torch.empty(shape, dtype=dtype, device=device)
        except RuntimeError as error:
            raise InvalidParameter(
                "kv_cache_memory_bytes", f"{num_pages} pages do not fit: {error}"
            ) from None
        return cls(
            keys=[memory[i, 0].view(num_pages, heads, dim, page_size) for i in range(config.num_layers)],
            values=[memory[i, 1].view(num_pages, heads, page_size, dim) for i in range(config.num_layers)],
        )


def fitting_pages(
    config: ModelConfig,
    *,
    page_size: int,
    dtype: torch.dtype,
    device: str,
    max_num_seqs: int,
    max_model_len: int,
    memory_bytes: int | None,
) -> int:
    """Pages within `memory_bytes` or a fraction of what is free; never more than could be used at once.

    Raises `InvalidParameter` when not even one page fits.
    """
    page_bytes = page_size * config.kv_bytes_per_token(dtype.itemsize)
    usable = max_num_seqs * -(-max_model_len // page_size)
    if memory_bytes is None:
        kind = torch.device(device).type
        memory_bytes = int(free_memory_bytes(device) * FREE_MEMORY_FRACTION[kind])
        if kind == "cuda":  # what a step needs beside the pages: fp64 rows of the sampler, attention scores
            memory_bytes -= max_num_seqs * config.vocab_size * 8 * 5 + 2**30
    num_pages = min(memory_bytes // page_bytes, usable)
    if num_pages < 1:
        raise InvalidParameter(
            "kv_cache_memory_bytes", f"{memory_bytes} bytes hold no page; one needs {page_bytes}"
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
