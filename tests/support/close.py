"""How near a kernel's result must come to the exact one."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = {  # relative, absolute
    torch.float32: (2e-5, 2e-5),
    torch.bfloat16: (1.2e-2, 1e-2),
    torch.float16: (1.5e-3, 1.5e-3),
}


def assert_close(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    relative, absolute = TOLERANCE[dtype]
    torch.testing.assert_close(found.double(), wanted.double(), rtol=relative, atol=absolute)
