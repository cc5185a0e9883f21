"""QuantisedSource: the tensors of a quantised checkpoint, each quantised module's parts as one plain `weight`.

Owns which stored tensors belong to a module, their names, shapes and dtypes, and the way from them into rows of a
parameter, some million weights at a time, so that neither the packed nor the unpacked matrix is ever whole beside the
parameter. A weight that stays quantised is repacked on its device, from stored words that are whole there. Knows no
formula (`dequantise`), and nothing of what a model wants (`weights`, `kept_weights`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import torch
from torch import Tensor

from engine.config import UnsupportedCheckpoint
from engine.dequantise import scaled_floats, scaled_integers, unpacked_awq, unpacked_columns, unpacked_rows
from engine.quantisation import Float8, PackedIntegers, is_plain
from engine.safetensors_file import StoredTensor
from kernels.weights import Float8Weight, Int4Weight, QuantisedWeight

_WEIGHTS_AT_ONCE = 2**21
_REPACKED_AT_ONCE = 2**23
_SCALE_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
_SCALES = tuple(_SCALE_DTYPES)
# Of activations, for kernels that quantise them, too; here they are never quantised
_OF_ACTIVATIONS = ("input_scale", "activation_scale")


class StoredTensors(Protocol):
    """A source of plain tensors that also gives raw ones."""

    tensors: Mapping[str, tuple[tuple[int, ...], int]]
    at: Mapping[str, tuple[Path, StoredTensor]]

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def check(self, name: str) -> None: ...

    def copy(self, name: str, start: int, end: int, target: Tensor) -> None: ...

    def read(self, name: str, start: int = 0, end: int | None = None) -> Tensor:
        """Rows `start` to `end` in the dtype in which they are stored."""
        ...


@dataclass(frozen=True, slots=True)
class Module:
    """One quantised module: `parts` are its tensors by the last part of their names."""

    name: str
    shape: tuple[int, int]  # of the plain weight: outputs, inputs
    parts: Mapping[str, str]
    group_size: int  # inputs that share a scale; for floats unused
    block: tuple[int, int]  # outputs and inputs that share a scale; for integers unused


class QuantisedSource:
    """A `WeightSource`. Raises `UnsupportedCheckpoint` naming a tensor that a quantised module lacks, or that has a
    dtype or a shape that its module cannot have, before any weight is read."""

    piece_bytes = 2**20

    def __init__(self, stored: StoredTensors, quantisation: PackedIntegers | Float8) -> None:
        self._stored = stored
        self._quantisation = quantisation
        self._modules: dict[str, Module] = {}
        self._must_be_zero: list[str] = []
        find = self._packed if isinstance(quantisation, PackedIntegers) else self._float8
        hidden: set[str] = set()
        tensors: dict[str, tuple[tuple[int, ...], int]] = {}
        for name, entry in stored.tensors.items():
            module = find(name)
            if module is None:
                tensors[name] = entry
                continue
            weight = f"{module.name}.weight"
            if is_plain(module.name, quantisation.plain):
                raise self._error(
                    name, f"is quantised, but config.json lists {module.name} as one that is not"
                )
            if weight in stored.tensors and name != weight:
                raise self._error(weight, "is there twice, plainly and quantised")
            hidden.update(module.parts.values())
            num_bytes = sum(stored.tensors[part][1] for part in module.parts.values())
            self._modules[weight] = module
            tensors[weight] = module.shape, num_bytes
        self.tensors: Mapping[str, tuple[tuple[int, ...], int]] = {
            name: entry for name, entry in tensors.items() if name in self._modules or name not in hidden
        }

    def __enter__(self) -> Self:
        self._stored.__enter__()
        try:
            for name in self._must_be_zero:
                if self._stored.read(name).count_nonzero():
                    raise self._error(name, "is not known")
        except BaseException:
            self._stored.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stored.__exit__()

    def check(self, name: str) -> None:
        if name not in self._modules:
            self._stored.check(name)

    def unit(self, name: str) -> int:
        module = self._modules.get(name)
        return module.shape[0] if module and isinstance(self._quantisation, PackedIntegers) else 1

    def leave_out(self, name: str) -> bool:
        """Quantisers write a bias of zeros beside every product, also where the model has none."""
        module, _, kind = name.rpartition(".")
        if kind != "bias" or f"{module}.weight" not in self._modules:
            return False
        self._stored.check(name)
        self._must_be_zero.append(name)
        return True

    def copy(self, name: str, start: int, end: int, target: Tensor) -> None:
        module = self._modules.get(name)
        if module is None:
            self._stored.copy(name, start, end, target)
        elif isinstance(self._quantisation, PackedIntegers):
            self._copy_packed(module, self._quantisation, target)
        else:
            self._copy_float8(module, start, target)

    def packed_module(self, name: str) -> Module | None:
        """The module whose plain weight `name` would be; None where that is no integers of 4 bits."""
        how = self._quantisation
        return self._modules.get(name) if isinstance(how, PackedIntegers) and how.bits == 4 else None

    def float8_module(self, name: str) -> Module | None:
        """The module whose plain weight `name` would be; None where that is no floats of 8 bits."""
        return self._modules.get(name) if isinstance(self._quantisation, Float8) else None

    def scale_dtype(self, module: Module) -> torch.dtype:
        return _SCALE_DTYPES[self._stored.at[module.parts["scales"]][1].dtype]

    def order(self, module: Module) -> Tensor | None:
        """`[in]` int64: the module's inputs group by group; None: they lie so. Raises `UnsupportedCheckpoint`."""
        assert isinstance(self._quantisation, PackedIntegers)
        groups = self._groups(module, self._quantisation)
        return None if bool((groups.diff() >= 0).all()) else groups.argsort(stable=True)

    def keep(self, name: str, start: int, end: int, target: QuantisedWeight) -> None:
        """Rows `start` to `end` of a module as it is stored, all of them where they are integers, into a quantised
        weight of its shape."""
        module, how = self._modules[name], self._quantisation
        if isinstance(how, PackedIntegers):
            assert isinstance(target, Int4Weight)
            self._keep_packed(module, how, target)
            return
        assert isinstance(target, Float8Weight)
        target.floats[start:end].copy_(self._read(module, "weight", start, end))
        if start == 0:
            scales = self._float8_scales(module)
            target.scales.copy_(scales if target.blocks else scales.expand(module.shape[0], 1)[:, 0])

    def _keep_packed(self, module: Module, how: PackedIntegers, target: Int4Weight) -> None:
        (outputs, inputs), device = module.shape, target.words.device
        order = self.order(module)
        if order is not None and target.order is not None:
            order = target.order.copy_(order)
        target.put_groups(self._zeros(module, how).to(device), self._read(module, "scales").to(device))
        words = self._read(module, "qweight").to(device)
        together = max(8, _REPACKED_AT_ONCE // inputs // 8 * 8)
        for start in range(0, outputs, together):
            end = min(start + together, outputs)
            if how.method == "awq":
                integers = unpacked_awq(words[:, start // 8 : end // 8])
            else:
                integers = unpacked_rows(words[:, start:end], 4)
            target.rows(start, end).put(integers if order is None else integers[order])

    def _copy_packed(self, module: Module, how: PackedIntegers, target: Tensor) -> None:
        outputs, inputs = module.shape
        per_word = 1 if how.method == "awq" else 32 // how.bits  # inputs in one row of words
        zeros, scales, groups = (
            self._zeros(module, how),
            self._read(module, "scales").float(),
            self._groups(module, how),
        )
        together = max(1, _WEIGHTS_AT_ONCE // outputs // per_word) * per_word
        for start in range(0, inputs, together):
            end = min(start + together, inputs)
            words = self._read(module, "qweight", start // per_word, end // per_word)
            integers = unpacked_awq(words) if how.method == "awq" else unpacked_rows(words, how.bits)
            target[:, start:end].copy_(scaled_integers(integers, zeros, scales, groups[start:end]).t())

    def _zeros(self, module: Module, how: PackedIntegers) -> Tensor:
        """`[groups, out]` int32."""
        words = self._read(module, "qzeros")
        if how.method == "awq":
            return unpacked_awq(words)
        zeros = unpacked_columns(words, how.bits)
        if not how.zeros_less_one:
            return zeros
        if int(zeros.max()) == 2**how.bits - 1:  # 0 less 1, without a sign
            raise self._error(
                module.parts["qzeros"],
                f"stores {2**how.bits - 1} as a zero less 1, which some read as 0 and others as {2**how.bits}; "
                "checkpoint_format gptq_v2 has no such doubt",
            )
        return zeros + 1

    def _groups(self, module: Module, how: PackedIntegers) -> Tensor:
        """The group of each input, `[in]` int64."""
        in_order = torch.arange(module.shape[1]) // module.group_size
        if "g_idx" not in module.parts:
            return in_order
        groups = self._read(module, "g_idx").long()
        if not how.act_order and not groups.any():  # written by quantisers that know no other order
            return in_order
        if not torch.equal(groups.sort().values, in_order):
            raise self._error(
                module.parts["g_idx"],
                f"does not give every group {module.group_size} inputs, the last one the rest",
            )
        return groups

    def _copy_float8(self, module: Module, start: int, target: Tensor) -> None:
        inputs = module.shape[1]
        scales = self._float8_scales(module)
        together = max(1, _WEIGHTS_AT_ONCE // inputs)
        for first in range(0, target.shape[0], together):
            piece = target[first : first + together]
            floats = self._read(module, "weight", start + first, start + first + piece.shape[0])
            piece.copy_(scaled_floats(floats, scales, module.block, start + first))

    def _float8_scales(self, module: Module) -> Tensor:
        """`[blocks of outputs, blocks of inputs]` fp32."""
        (outputs, inputs), block = module.shape, module.block
        return self._read(module, "scale").float().view(-(-outputs // block[0]), -(-inputs // block[1]))

    def _read(self, module: Module, part: str, start: int = 0, end: int | None = None) -> Tensor:
        return self._stored.read(module.parts[part], start, end)

    def _packed(self, name: str) -> Module | None:
        """The module whose integers `name` is."""
        how = self._quantisation
        module, _, kind = name.rpartition(".")
        if kind != "qweight" or not isinstance(how, PackedIntegers):
            return None
        per_word = 32 // how.bits
        parts = {part: f"{module}.{part}" for part in ("qweight", "qzeros", "scales")}
        rows, columns = self._matrix(name)
        inputs, outputs = (rows, columns * per_word) if how.method == "awq" else (rows * per_word, columns)
        group_size = how.group_size or inputs
        if outputs % per_word or (how.method == "awq" and inputs % group_size):
            raise self._error(
                name,
                f"is of {inputs} inputs in groups of {group_size} and {outputs} outputs in words of {per_word}",
            )
        groups = -(-inputs // group_size)
        if how.method == "gptq" and (
            f"{module}.g_idx" in self._stored.tensors or (how.act_order and how.group_size)
        ):
            parts["g_idx"] = self._expect(f"{module}.g_idx", ("I32",), (inputs,))
        self._expect(name, ("I32",), (rows, columns))
        self._expect(parts["qzeros"], ("I32",), (groups, outputs // per_word))
        self._expect(parts["scales"], _SCALES, (groups, outputs))
        return Module(module, (outputs, inputs), parts, group_size, (1, 1))

    def _float8(self, name: str) -> Module | None:
        """The module whose floats of 8 bits `name` is."""
        how = self._quantisation
        module, _, kind = name.rpartition(".")
        if kind != "weight" or not isinstance(how, Float8) or self._stored.at[name][1].dtype != "F8_E4M3":
            return None
        outputs, inputs = self._matrix(name)
        block = how.block[0] or outputs, how.block[1] or inputs
        shape = (-(-outputs // block[0]), -(-inputs // block[1]))
        also: tuple[tuple[int, ...], ...] = () if how.block[1] else (shape[:1],)  # without the axis of inputs
        if how.block == (None, None):
            also = (*also, ())
        names = [f"{module}.{scale}" for scale in how.scale_names]
        scale = next((one for one in names if one in self._stored.tensors), names[0])
        parts = {"weight": name, "scale": self._expect(scale, _SCALES, shape, *also)}
        for kind in _OF_ACTIVATIONS:
            if f"{module}.{kind}" in self._stored.tensors:
                parts[kind] = f"{module}.{kind}"
        return Module(module, (outputs, inputs), parts, inputs, block)

    def _matrix(self, name: str) -> tuple[int, int]:
        shape, _ = self._stored.tensors[name]
        if len(shape) != 2 or 0 in shape:
            raise self._error(name, f"has shape {shape}, which is no matrix")
        return shape[0], shape[1]

    def _expect(self, name: str, dtypes: tuple[str, ...], *shapes: tuple[int, ...]) -> str:
        if name not in self._stored.tensors:
            raise UnsupportedCheckpoint(f"tensor {name} of a quantised module is missing")
        found = self._stored.at[name][1]
        if found.dtype not in dtypes:
            raise self._error(name, f"is stored as {found.dtype}; allowed: {', '.join(dtypes)}")
        if found.shape not in shapes:
            raise self._error(
                name, f"has shape {found.shape}, not {' or '.join(str(shape) for shape in shapes)}"
            )
        return name

    def _error(self, name: str, what: str) -> UnsupportedCheckpoint:
        return UnsupportedCheckpoint(f"{self._stored.at[name][0]}: tensor {name} {what}")
