"""QuantisedSource: the tensors of a quantised checkpoint, each quantised module's parts as one plain tensor.

Owns that every stored tensor is either plain or a part of one module, as config.json says it, and the biases of zeros
that quantisers add. What the parts of a module are and how they become a plain tensor is its format's affair
(`packed_module`, `float8_module`, `float4_module`). Knows nothing of what a model wants (`weights`, `kept_weights`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, Self

from torch import Tensor

from engine.float4_module import Float4Module, float4_module
from engine.float8_module import Float8Module, float8_module
from engine.packed_module import PackedModule, packed_module
from engine.quantisation import Float8, PackedIntegers, Quantisation, is_plain
from engine.stored_tensors import StoredTensors, refusal
from kernels.weights import KeptWeight


class QuantisedModule(Protocol):
    """Stored tensors that together are one plain tensor."""

    @property
    def name(self) -> str:
        """By which config.json may say that the module is not quantised."""
        ...

    @property
    def tensor(self) -> str:
        """Name of the plain tensor."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the plain tensor."""
        ...

    @property
    def parts(self) -> Mapping[str, str]:
        """What it is made of: the format's word for it → name of a stored tensor."""
        ...

    @property
    def unit(self) -> int:
        """Rows that must be copied together."""
        ...

    def copy(self, start: int, end: int, target: Tensor) -> None:
        """Rows `start` to `end` of the plain tensor, converted to the target's dtype. Raises
        `UnsupportedCheckpoint`."""
        ...


class QuantisedSource:
    """A `WeightSource`. `modules`: by the names of their plain tensors.

    Raises `UnsupportedCheckpoint`, before any weight is read, naming a tensor that a quantised module lacks, or that
    has a dtype or a shape that its module cannot have.
    """

    piece_bytes = 2**20

    def __init__(self, stored: StoredTensors, quantisation: Quantisation) -> None:
        self._stored = stored
        self._must_be_zero: list[str] = []
        modules: dict[str, QuantisedModule] = {}
        parts: set[str] = set()
        tensors: dict[str, tuple[tuple[int, ...], int]] = {}
        for name, entry in stored.tensors.items():
            module = _found(stored, quantisation, name)
            if module is None:
                tensors[name] = entry
                continue
            if is_plain(module.name, quantisation.plain):
                raise refusal(
                    stored, name, f"is quantised, but config.json lists {module.name} as one that is not"
                )
            if module.tensor in stored.tensors and name != module.tensor:
                raise refusal(stored, module.tensor, "is there twice, plainly and quantised")
            parts.update(module.parts.values())
            num_bytes = sum(stored.tensors[part][1] for part in module.parts.values())
            modules[module.tensor] = module
            tensors[module.tensor] = module.shape, num_bytes
        self.modules: Mapping[str, QuantisedModule] = modules
        self.tensors: Mapping[str, tuple[tuple[int, ...], int]] = {
            name: entry for name, entry in tensors.items() if name in modules or name not in parts
        }

    def __enter__(self) -> Self:
        self._stored.__enter__()
        try:
            for name in self._must_be_zero:
                if self._stored.read(name).count_nonzero():
                    raise refusal(self._stored, name, "is not known")
        except BaseException:
            self._stored.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stored.__exit__()

    def check(self, name: str) -> None:
        if name not in self.modules:
            self._stored.check(name)

    def unit(self, name: str) -> int:
        return self.modules[name].unit if name in self.modules else 1

    def leave_out(self, name: str) -> bool:
        """Quantisers write a bias of zeros beside every product, also where the model has none."""
        module, _, kind = name.rpartition(".")
        if kind != "bias" or f"{module}.weight" not in self.modules:
            return False
        self._stored.check(name)
        self._must_be_zero.append(name)
        return True

    def copy(self, name: str, start: int, end: int, target: Tensor) -> None:
        module = self.modules.get(name)
        if module is None:
            self._stored.copy(name, start, end, target)
        else:
            module.copy(start, end, target)

    def keep(self, name: str, start: int, end: int, target: KeptWeight) -> None:
        """Rows `start` to `end` of a module as it is stored, all of them where they are integers, into a quantised
        weight of its shape, or where they are experts, of theirs."""
        module = self.modules[name]
        assert isinstance(module, PackedModule | Float8Module | Float4Module)
        module.keep(start, end, target)


def _found(stored: StoredTensors, how: Quantisation, name: str) -> QuantisedModule | None:
    """The module whose weights the tensor `name` holds."""
    if isinstance(how, PackedIntegers):
        return packed_module(stored, how, name)
    return float8_module(stored, how, name) if isinstance(how, Float8) else float4_module(stored, name)
