"""The parameters of a decoder, as loading a checkpoint leaves them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoint import Checkpoint
from engine.model import Decoder
from engine.weights import load_weights
from kernels.reference import KERNELS


def parameters(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """By name. What nobody writes is NaN."""
    checkpoint = Checkpoint.open(str(folder))
    decoder = Decoder(checkpoint.config, KERNELS, dtype=dtype, device="cpu")
    for parameter in decoder.parameters.values():
        parameter.fill_(float("nan"))
    load_weights(decoder, checkpoint)
    return decoder.parameters
