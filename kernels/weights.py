"""Weights that are not plain tensors on their device: their layouts, and what they mean.

Owns how integers and floats of 4 bits lie in words, the shapes of scales and zeros, and the fp32 weight that each
stands for. Knows no checkpoint's names and no product (the kernel sets multiply with them).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

BLOCK = 128  # inputs of a row of words
PER_WORD = 8  # integers of 4 bits
PIECE = BLOCK // PER_WORD  # inputs that lie in the same bits of neighbouring words
FLOAT_BLOCK = 32  # inputs that share a scale of 8 bits
# Open Compute Project, Microscaling Formats v1.0: what 4 bits (E2M1) and what a scale of 8 bits (E8M0) mean
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FLOATS_OF_4_BITS = (*_MAGNITUDES, *(-value for value in _MAGNITUDES))
POWERS = (*(2.0 ** (byte - 127) for byte in range(255)), float("nan"))
_FLOAT_SHIFTS = (12, 28, 8, 24, 4, 20, 0, 16)  # of the eight inputs of a word, as `Float4Weight` has them


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


@dataclass(frozen=True, slots=True, eq=False)
class Float4Weight:
    """`[E, out, in]`, of all experts of a layer: each weight is float · 2^(scale - 127), in fp32. Floats are E2M1; 32
    inputs share a scale, E8M0, of which 255 is NaN (MXFP4: Open Compute Project, Microscaling Formats v1.0).

    `words[e, b, n]` are inputs 32·b to 32·b + 31 of output n: the 16 bytes that a thread loads at once. Those of the
    next output follow, so that a tile of a product is read in one piece whatever the shape. Input 8·w + 2·t + h of
    them is in word w, from bit 16·h + 12 - 4·t on: shifted left by 4·t, the two halves of a word begin with two
    neighbouring inputs, which become two numbers of 16 bits together, in their order and in the registers where they
    are. Scales of neighbouring outputs lie side by side as well.
    """

    words: Tensor  # [E, in / 32, out, 4] int32
    scales: Tensor  # [E, in / 32, out] uint8

    @classmethod
    def empty(cls, experts: int, outputs: int, inputs: int, *, device: str | torch.device) -> Float4Weight:
        """Uninitialised memory. Raises `ValueError` where blocks do not divide the inputs."""
        if inputs % FLOAT_BLOCK:
            raise ValueError(f"{inputs} inputs are no whole blocks of {FLOAT_BLOCK}")
        places = experts, inputs // FLOAT_BLOCK, outputs
        return cls(
            torch.empty(*places, FLOAT_BLOCK // PER_WORD, dtype=torch.int32, device=device),
            torch.empty(places, dtype=torch.uint8, device=device),
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(experts, outputs, inputs)."""
        experts, blocks, outputs = self.scales.shape
        return experts, outputs, blocks * FLOAT_BLOCK

    @property
    def num_bytes(self) -> int:
        return self.words.nbytes + self.scales.nbytes

    def experts(self, start: int, end: int) -> Float4Weight:
        """A view of experts `start` to `end`."""
        return Float4Weight(self.words[start:end], self.scales[start:end])

    def put(self, blocks: Tensor, scales: Tensor) -> None:
        """Store blocks `[E, out, in / 32, 16]` uint8, contiguous, of two inputs a byte, the first in its low bits,
        and scales `[E, out, in / 32]` uint8."""
        # [E, out, in / 32, 4]: of the inputs of a word number i from bit 4·i on
        stored = blocks.to(self.words.device).view(torch.int32)
        words = torch.zeros_like(stored)
        for number, shift in enumerate(_FLOAT_SHIFTS):
            words |= ((stored >> 4 * number) & 15) << shift
        self.words.copy_(words.transpose(1, 2))
        self.scales.copy_(scales.transpose(1, 2))

    def dequantised(self) -> Tensor:
        """`[E, out, in]` fp32."""
        device = self.words.device
        shifts = torch.tensor(_FLOAT_SHIFTS, dtype=torch.int32, device=device)
        floats = torch.tensor(FLOATS_OF_4_BITS, device=device)[(self.words[..., None] >> shifts) & 15]
        powers = torch.tensor(POWERS, dtype=torch.float64, device=device).float()[self.scales.int()]
        return (floats.flatten(3) * powers[..., None]).transpose(1, 2).flatten(2)


@dataclass(frozen=True, slots=True, eq=False)
class Float8Experts:
    """`[E, out, in]`, of all experts of a layer, one `Float8Weight` behind the other."""

    floats: Tensor  # [E, out, in] float8_e4m3fn
    scales: Tensor  # [E, out] fp32, or [E, ⌈out / 128⌉, ⌈in / 128⌉] fp32

    @classmethod
    def empty(
        cls, experts: int, outputs: int, inputs: int, *, blocks: bool, device: str | torch.device
    ) -> Float8Experts:
        """Uninitialised memory."""
        shape = (-(-outputs // BLOCK), -(-inputs // BLOCK)) if blocks else (outputs,)
        return cls(
            torch.empty(experts, outputs, inputs, dtype=torch.float8_e4m3fn, device=device),
            torch.empty(experts, *shape, dtype=torch.float32, device=device),
        )

    @property
    def blocks(self) -> bool:
        return self.scales.dim() == 3

    @property
    def shape(self) -> tuple[int, int, int]:
        """(experts, outputs, inputs)."""
        experts, outputs, inputs = self.floats.shape
        return experts, outputs, inputs

    @property
    def num_bytes(self) -> int:
        return self.floats.nbytes + self.scales.nbytes

    def experts(self, start: int, end: int) -> Float8Experts:
        """A view of experts `start` to `end`."""
        return Float8Experts(self.floats[start:end], self.scales[start:end])

    def expert(self, number: int) -> Float8Weight:
        """A view of one."""
        return Float8Weight(self.floats[number], self.scales[number])


@dataclass(frozen=True, slots=True, eq=False)
class Int4Experts:
    """`[E, out, in]`, of all experts of a layer, one `Int4Weight` behind the other, their inputs in order."""

    words: Tensor  # [E, in / 128, 16, out] int32
    groups: Tensor  # [E, groups, out] int32
    scale: torch.dtype  # of the scales: fp16 or bf16

    @classmethod
    def empty(
        cls,
        experts: int,
        outputs: int,
        inputs: int,
        group_size: int,
        *,
        scale: torch.dtype,
        device: str | torch.device,
    ) -> Int4Experts:
        """Uninitialised memory. Raises `ValueError` where it does not fit (`Int4Weight.fits`)."""
        if not Int4Weight.fits(inputs, group_size):
            raise ValueError(f"{inputs} inputs in groups of {group_size} do not fit")
        return cls(
            torch.empty(experts, inputs // BLOCK, PIECE, outputs, dtype=torch.int32, device=device),
            torch.empty(experts, inputs // group_size, outputs, dtype=torch.int32, device=device),
            scale,
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(experts, outputs, inputs)."""
        return self.words.shape[0], self.words.shape[3], self.words.shape[1] * BLOCK

    @property
    def num_bytes(self) -> int:
        return self.words.nbytes + self.groups.nbytes

    def experts(self, start: int, end: int) -> Int4Experts:
        """A view of experts `start` to `end`."""
        return Int4Experts(self.words[start:end], self.groups[start:end], self.scale)

    def expert(self, number: int) -> Int4Weight:
        """A view of one."""
        return Int4Weight(self.words[number], self.groups[number], self.scale)


QuantisedWeight = Int4Weight | Float8Weight  # of one product
StackedWeight = Int4Experts | Float8Experts  # of experts that files have one by one
ExpertsWeight = Float4Weight | StackedWeight  # of one product of each expert
KeptWeight = QuantisedWeight | ExpertsWeight
