"""The noise of draws: the same bits from numpy, from a kernel, and from the published formula in whole numbers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gpu.noise import uniform
from kernels.noise import uniforms

GOLDEN = 0x9E3779B97F4A7C15
EDGES = [0, 1, -1, 2**31, 2**32 - 1, -(2**31), 2**63 - 1, -(2**63)]
SEEDS = [seed for seed in EDGES for _ in range(4)]
POSITIONS = [0, 1, 4096, 2**31] * len(EDGES)


def mixed(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def plain(seed: int, position: int) -> float:
    state = mixed((seed + GOLDEN) % 2**64) ^ (position * 0xD1342543DE82EF95 % 2**64)
    return (mixed((state + GOLDEN) % 2**64) >> 11) / 2**53


@triton.jit
def noise_kernel(seeds, positions, out, BLOCK: tl.constexpr):  # noqa: N803
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, uniform(tl.load(seeds + i), tl.load(positions + i)))


def test_the_formula() -> None:
    found = uniforms(SEEDS, POSITIONS).tolist()
    assert found == [plain(seed, position) for seed, position in zip(SEEDS, POSITIONS, strict=True)]
    assert all(0 <= u < 1 for u in found)
    assert mixed(GOLDEN) == 0xE220A8397B1DCDAF  # what SplitMix64 begins with, seeded with 0


def test_a_kernel_makes_the_same_bits() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(1)
    bounds = {"low": -(2**63), "high": 2**63 - 1, "generator": generator}
    seeds = torch.cat((torch.tensor(SEEDS), torch.randint(size=(992,), **bounds)))
    positions = torch.cat((torch.tensor(POSITIONS), torch.randint(0, 2**20, (992,), generator=generator)))
    for block in (1, 256):
        out = torch.empty(1024, dtype=torch.float64, device=device)
        count = 32 if block == 1 else 1024
        noise_kernel[(count // block,)](seeds.to(device), positions.to(device), out, BLOCK=block)
        expected = torch.from_numpy(uniforms(seeds.numpy(), positions.numpy()))
        assert torch.equal(out[:count].cpu(), expected[:count])
