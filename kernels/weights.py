"""Weights that are not plain tensors on their device: their layouts, and what they mean.

Owns how 4-bit integers lie in words, the shapes of scales and zeros, and the fp32 weight that each stands for. Knows
no checkpoint's format and no product (the kernel sets multiply with them).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

BLOCK = 128  # inputs of a row of words
PER_WORD = 8  # integers of 4 bits
PIECE = BLOCK // PER_WORD  # inputs that lie in the same bits of neighbouring words


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """A plain weight in an order that only the set that made it knows (`Kernels.pack`)."""

    shape: tuple[int, int]  # out, in
    words: Tensor  # [some] of the weight's dtype


@dataclass(frozen=True, slots=True, eq=False)
class Int8Weight:
    """`[out, in]`: each weight is its integer, of -127 to 127, times the scale of its output, in fp32."""

    shape: tuple[int, int]  # out, in
    words: Tensor  # [some] int8: the integers, in an order that only the set that made it knows
    scales: Tensor  # [out] fp32


def rounded_to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Integers int8 and scales `[out]` fp32 of a weight `[out, in]`: a scale is the largest |weight| of an output /
    127, an integer is weight / scale, rounded to nearest even; 0 where the scale is."""
    wide = weight.float()
    scales = wide.abs().amax(dim=1) / 127.0
    steps = torch.where(scales > 0, scales, 1.0)
    return (wide / steps[:, None]).round_().clamp_(-127, 127).to(torch.int8), scales


@dataclass(frozen=True, slots=True, eq=False)
class Int4Weight:
    """`[out, in]`: each weight is (integer - zero) · scale, in fp32.

    Bits 4·i to 4·i + 3 of `words[b, j, n]` are the integer of output n and input 128·b + 16·i + j, so that 16
    neighbouring inputs of all outputs come out of one tile of words by one shift. Inputs are a multiple of 128. A
    group, whose inputs share zero and scale, is one of 16, 32 or 64 inputs or a multiple of 128, and divides them.
    `order`: the input of x that each stored input is; None: they are in order.
    """

    words: Tensor  # [in / 128, 16, out] int32
    groups: Tensor  # [groups, out] int32: the zero, 0 to 16, below the 16 bits of the scale
    scale: torch.dtype  # of the scales: fp16 or bf16
    order: Tensor | None = None  # [in] int64

    @staticmethod
    def fits(inputs: int, group_size: int) -> bool:
        """Whether there is such a weight of so many inputs in groups of that size."""
        together = group_size in (16, 32, 64) or (group_size > 0 and group_size % BLOCK == 0)
        return together and inputs % BLOCK == 0 and inputs % group_size == 0

    @classmethod
    def empty(
        cls,
        outputs: int,
        inputs: int,
        group_size: int,
        *,
        scale: torch.dtype,
        device: str | torch.device,
        ordered: bool = False,
    ) -> Int4Weight:
        """Uninitialised memory. `ordered`: with an `order`. Raises `ValueError` where it does not fit (`fits`)."""
        if not cls.fits(inputs, group_size):
            raise ValueError(f"{inputs} inputs in groups of {group_size} do not fit")
        return cls(
            torch.empty(inputs // BLOCK, PIECE, outputs, dtype=torch.int32, device=device),
            torch.empty(inputs // group_size, outputs, dtype=torch.int32, device=device),
            scale,
            torch.empty(inputs, dtype=torch.int64, device=device) if ordered else None,
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        return self.words.shape[2], self.words.shape[0] * BLOCK

    @property
    def group_size(self) -> int:
        return self.shape[1] // self.groups.shape[0]

    @property
    def num_bytes(self) -> int:
        return sum(part.nbytes for part in (self.words, self.groups, self.order) if part is not None)

    def rows(self, start: int, end: int) -> Int4Weight:
        """A view of outputs `start` to `end`."""
        return replace(self, words=self.words[..., start:end], groups=self.groups[:, start:end])

    def put(self, integers: Tensor, start: int = 0) -> None:
        """Store integers `[n, out]`, 0 to 15, of inputs `start` to `start + n` in stored order, both multiples of
        128."""
        shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=integers.device)
        apart = integers.to(torch.int32).view(-1, PER_WORD, PIECE, integers.shape[1]) << shifts[:, None, None]
        first = start // BLOCK
        self.words[first : first + apart.shape[0]].copy_(apart.sum(dim=1, dtype=torch.int32))  # no bit twice

    def put_groups(self, zeros: Tensor, scales: Tensor) -> None:
        """Store zeros and scales, each `[groups, out]`."""
        bits = scales.to(self.scale).view(torch.int16).to(torch.int32)
        self.groups.copy_((bits << 16) | zeros.to(torch.int32))

    @property
    def zeros(self) -> Tensor:
        """`[groups, out]` int32."""
        return self.groups & 0xFFFF

    @property
    def scales(self) -> Tensor:
        """`[groups, out]` fp32."""
        return (self.groups >> 16).to(torch.int16).view(self.scale).float()

    def integers(self) -> Tensor:
        """`[in, out]` int32, in stored order."""
        shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=self.words.device)
        return ((self.words[:, None] >> shifts[:, None, None]) & 15).flatten(0, 2)

    def dequantised(self) -> Tensor:
        """`[out, in]` fp32, inputs in the order of x."""
        size = self.group_size
        shifted = self.integers() - self.zeros.repeat_interleave(size, dim=0)
        stored = (shifted.float() * self.scales.repeat_interleave(size, dim=0)).t()
        if self.order is None:
            return stored.contiguous()
        return torch.empty_like(stored).index_copy_(1, self.order, stored)


@dataclass(frozen=True, slots=True, eq=False)
class Float8Weight:
    """`[out, in]`: each weight is float · scale, in fp32. A scale is one output's, or one block's of 128 outputs and
    128 inputs; the last blocks may be cut short."""

    floats: Tensor  # [out, in] float8_e4m3fn
    scales: Tensor  # [out] fp32, or [⌈out / 128⌉, ⌈in / 128⌉] fp32

    @classmethod
    def empty(cls, outputs: int, inputs: int, *, blocks: bool, device: str | torch.device) -> Float8Weight:
        """Uninitialised memory."""
        shape = (-(-outputs // BLOCK), -(-inputs // BLOCK)) if blocks else (outputs,)
        return cls(
            torch.empty(outputs, inputs, dtype=torch.float8_e4m3fn, device=device),
            torch.empty(shape, dtype=torch.float32, device=device),
        )

    @property
    def blocks(self) -> bool:
        return self.scales.dim() == 2

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        return self.floats.shape[0], self.floats.shape[1]

    @property
    def num_bytes(self) -> int:
        return self.floats.nbytes + self.scales.nbytes

    def rows(self, start: int, end: int) -> Float8Weight:
        """A view of outputs `start` to `end`; with blocks `start` is a multiple of 128."""
        scales = self.scales[start // BLOCK : -(-end // BLOCK)] if self.blocks else self.scales[start:end]
        return Float8Weight(self.floats[start:end], scales)

    def dequantised(self) -> Tensor:
        """`[out, in]` fp32."""
        outputs, inputs = self.shape
        if not self.blocks:
            return self.floats.float() * self.scales[:, None]
        scales = self.scales.repeat_interleave(BLOCK, dim=0)[:outputs]
        return self.floats.float() * scales.repeat_interleave(BLOCK, dim=1)[:, :inputs]


QuantisedWeight = Int4Weight | Float8Weight
