"""PackedModule: a module whose weights are integers of 4 or 8 bits in words of 32 (AWQ and GPTQ).

Owns the names, shapes and dtypes of its tensors and the way from them into a plain weight, some million weights at a
time, so that neither the packed nor the unpacked matrix is ever whole beside the parameter; and the way into a weight
that stays in 4 bits, which is repacked on its device from stored words that are whole there. Knows no formula
(`dequantise`), and nothing of what a model wants.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.dequantise import scaled_integers, unpacked_awq, unpacked_columns, unpacked_rows
from engine.quantisation import PackedIntegers
from engine.stored_tensors import SCALE_DTYPES, StoredTensors, expect, matrix_shape, refusal, rows_at_once
from kernels.weights import Int4Weight, KeptWeight

_REPACKED_AT_ONCE = 2**23  # weights


def packed_module(stored: StoredTensors, how: PackedIntegers, name: str) -> PackedModule | None:
    """The module whose integers the tensor `name` holds; None where it holds none. Raises `UnsupportedCheckpoint`
    naming a tensor that the module lacks, or that has a dtype or a shape that it cannot have."""
    module, _, kind = name.rpartition(".")
    if kind != "qweight":
        return None
    per_word = 32 // how.bits
    parts = {part: f"{module}.{part}" for part in ("qweight", "qzeros", "scales")}
    rows, columns = matrix_shape(stored, name)
    inputs, outputs = (rows, columns * per_word) if how.method == "awq" else (rows * per_word, columns)
    group_size = how.group_size or inputs
    if outputs % per_word or (how.method == "awq" and inputs % group_size):
        raise refusal(
            stored,
            name,
            f"is of {inputs} inputs in groups of {group_size} and {outputs} outputs in words of {per_word}",
        )
    groups = -(-inputs // group_size)
    if how.method == "gptq" and (f"{module}.g_idx" in stored.tensors or (how.act_order and how.group_size)):
        parts["g_idx"] = expect(stored, f"{module}.g_idx", ("I32",), (inputs,))
    expect(stored, name, ("I32",), (rows, columns))
    expect(stored, parts["qzeros"], ("I32",), (groups, outputs // per_word))
    expect(stored, parts["scales"], tuple(SCALE_DTYPES), (groups, outputs))
    return PackedModule(stored, how, module, (outputs, inputs), parts, group_size)


@dataclass(frozen=True, slots=True)
class PackedModule:
    """A `QuantisedModule`. Its outputs are the rows of the plain weight, and are copied together."""

    stored: StoredTensors
    how: PackedIntegers
    name: str
    shape: tuple[int, int]  # of the plain weight: outputs, inputs
    parts: Mapping[str, str]
    group_size: int  # inputs that share a zero and a scale

    @property
    def tensor(self) -> str:
        return f"{self.name}.weight"

    @property
    def unit(self) -> int:
        return self.shape[0]

    @property
    def scale_dtype(self) -> torch.dtype:
        return SCALE_DTYPES[self.stored.at[self.parts["scales"]][1].dtype]

    def order(self) -> Tensor | None:
        """`[in]` int64: the inputs group by group; None: they lie so. Raises `UnsupportedCheckpoint`."""
        groups = self._groups()
        return None if bool((groups.diff() >= 0).all()) else groups.argsort(stable=True)

    def copy(self, start: int, end: int, target: Tensor) -> None:
        """All rows, into a `target` `[out, in]`."""
        outputs, inputs = self.shape
        per_word = 1 if self.how.method == "awq" else 32 // self.how.bits  # inputs in one row of words
        zeros, scales, groups = self._zeros(), self._read("scales").float(), self._groups()
        together = rows_at_once(outputs * per_word) * per_word
        for first in range(0, inputs, together):
            last = min(first + together, inputs)
            words = self._read("qweight", first // per_word, last // per_word)
            integers = (
                unpacked_awq(words) if self.how.method == "awq" else unpacked_rows(words, self.how.bits)
            )
            target[:, first:last].copy_(scaled_integers(integers, zeros, scales, groups[first:last]).t())

    def keep(self, start: int, end: int, target: KeptWeight) -> None:
        """All rows as they are stored, into an `Int4Weight` of their shape."""
        assert isinstance(target, Int4Weight)
        (outputs, inputs), device = self.shape, target.words.device
        order = self.order()
        if order is not None and target.order is not None:
            order = target.order.copy_(order)
        target.put_groups(self._zeros().to(device), self._read("scales").to(device))
        words = self._read("qweight").to(device)
        together = max(8, _REPACKED_AT_ONCE // inputs // 8 * 8)
        for first in range(0, outputs, together):
            last = min(first + together, outputs)
            if self.how.method == "awq":
                integers = unpacked_awq(words[:, first // 8 : last // 8])
            else:
                integers = unpacked_rows(words[:, first:last], 4)
            target.rows(first, last).put(integers if order is None else integers[order])

    def _zeros(self) -> Tensor:
        """`[groups, out]` int32."""
        words, bits = self._read("qzeros"), self.how.bits
        if self.how.method == "awq":
            return unpacked_awq(words)
        zeros = unpacked_columns(words, bits)
        if not self.how.zeros_less_one:
            return zeros
        if int(zeros.max()) == 2**bits - 1:  # 0 less 1, without a sign
            raise refusal(
                self.stored,
                self.parts["qzeros"],
                f"stores {2**bits - 1} as a zero less 1, which some read as 0 and others as {2**bits}; "
                "checkpoint_format gptq_v2 has no such doubt",
            )
        return zeros + 1

    def _groups(self) -> Tensor:
        """The group of each input, `[in]` int64."""
        in_order = torch.arange(self.shape[1]) // self.group_size
        if "g_idx" not in self.parts:
            return in_order
        groups = self._read("g_idx").long()
        if not self.how.act_order and not groups.any():  # written by quantisers that know no other order
            return in_order
        if not torch.equal(groups.sort().values, in_order):
            raise refusal(
                self.stored,
                self.parts["g_idx"],
                f"does not give every group {self.group_size} inputs, the last one the rest",
            )
        return groups

    def _read(self, part: str, start: int = 0, end: int | None = None) -> Tensor:
        return self.stored.read(self.parts[part], start, end)
