"""A kernel set of a GPU behind tensors of the CPU, so that one suite runs every set wherever it lives.

Owns the way of a call's tensors to the device and back. Whole storages travel, so that views keep their strides,
share memory as they did, and what a kernel writes in place, or outside of where it should, is seen here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kernels import Kernels, kernels_for


def triton_kernels() -> Kernels:
    """The triton set, for tensors of the CPU: on the GPU if there is one, else in the interpreter."""
    return (
        hopping(kernels_for("cuda", "triton")) if torch.cuda.is_available() else kernels_for("cpu", "triton")
    )


def hopping(kernels: Kernels, device: str = "cuda") -> Kernels:
    """`kernels`, a set of `device`, which takes and gives tensors of the CPU."""
    operations = {
        field.name: _hopping(getattr(kernels, field.name), device)
        for field in fields(kernels)
        if callable(getattr(kernels, field.name))
    }
    return replace(kernels, **operations)


def _hopping(operation: Callable[..., Any], device: str) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        storages: dict[int, tuple[Tensor, Tensor]] = {}  # by address: the bytes here and there

        def there(value: Any) -> Any:
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                if storage.data_ptr() not in storages:
                    here = torch.empty(0, dtype=torch.uint8).set_(storage)
                    storages[storage.data_ptr()] = here, here.to(device)
                moved = storages[storage.data_ptr()][1].untyped_storage()
                empty = torch.empty(0, dtype=value.dtype, device=device)
                return empty.set_(moved, value.storage_offset(), value.shape, value.stride())
            if isinstance(value, tuple):
                return tuple(there(one) for one in value)
            if is_dataclass(value) and not isinstance(value, type):
                return replace(value, **{f.name: there(getattr(value, f.name)) for f in fields(value)})
            return value

        def back(value: Any) -> Any:
            if isinstance(value, tuple):
                moved = [back(one) for one in value]
                return type(value)(*moved) if hasattr(value, "_fields") else tuple(moved)
            return value.cpu() if isinstance(value, Tensor) else value

        found = operation(*(there(value) for value in args), **{k: there(v) for k, v in options.items()})
        found = back(found)
        for here, moved in storages.values():
            here.copy_(moved)
        return found

    return call
