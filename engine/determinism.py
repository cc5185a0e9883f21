"""Determinism: whether a token depends on its request alone, found out at load.

Attention and the small operations sum in an order that only the token's own context decides (`kernels`), but matrix
products may choose another order for another number of rows. So products of this model's own shapes are compared
bitwise between row counts; if they differ, or always where they are the library's on a CPU or in fp32, steps are
padded to a multiple of 16 rows, and compared again. (On a CPU with AVX-512 one row is summed otherwise than many,
which in bf16 shows in one number of some thousands: no check of a fraction of a second is sure to see it.) Where
determinism is asked for, the kernels' own products are used, and checked alike: those of `triton` at once, others
if the library's differ. Knows no requests, no steps and no memory.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from engine.model import Decoder
from engine.sampling_params import InvalidParameter

if TYPE_CHECKING:
    from engine.fallback import Fallback

logger = logging.getLogger(__name__)

PADDED_ROWS = 16
_FEW, _PLACES = (1, 2, 3, 5, 16, 31, 33, 96, 128, 250), 4  # rows that are compared, from where on among many
# bound the self-check to a fraction of a second: two cores, one GPU
_CHECK_FLOPS = {"cpu": 2e10, "cuda": 1e13}
# of our own products: each sum of `matmul.h` is one chain, whatever the rows, so a spot check is enough
_OWN_CHECK_FLOPS = _CHECK_FLOPS | {"cpu": 3e9}


def resolve_deterministic(wanted: bool | None, decoder: Decoder | Fallback) -> tuple[int, bool]:
    """(row multiple, whether tokens depend on their request alone). None: as on a CPU, where it is cheap.

    Raises `InvalidParameter` when it is wanted and cannot be had.
    """
    on_cpu = torch.device(decoder.device).type == "cpu"
    if wanted is False or (wanted is None and not on_cpu):
        return 1, False
    if decoder.crowded_by is not None:
        row_multiple, deterministic = 1, False
        reason = f"{decoder.crowded_by} cannot be checked, so tokens may depend on the crowd"
    else:
        if wanted and decoder.kernels.name == "triton":
            decoder.invariant_products()
        row_multiple, deterministic = row_invariance(decoder)
        if wanted and not deterministic and decoder.invariant_products():
            row_multiple, deterministic = row_invariance(decoder)
        reason = "products on this machine depend on their row count, so tokens may depend on the crowd"
    if not deterministic:
        if wanted:
            raise InvalidParameter("deterministic", f"cannot be had: {reason}")
        logger.warning(reason)
    return row_multiple, deterministic


def row_invariance(decoder: Decoder | Fallback) -> tuple[int, bool]:
    """(row multiple to pad steps to, whether products are then bit-equal for any number of rows)."""
    on_cpu = torch.device(decoder.device).type == "cpu"
    padded = (decoder.dtype == torch.float32 or on_cpu) and not decoder.own_products
    multiples = (PADDED_ROWS,) if padded else (1, PADDED_ROWS)
    for multiple in multiples:
        if _products_invariant(decoder, multiple):
            return multiple, True
    return 1, False


def _products_invariant(decoder: Decoder | Fallback, multiple: int) -> bool:
    products = decoder.distinct_products()
    elements = sum(product.num_inputs * product.num_outputs for product in products)
    bounds = _OWN_CHECK_FLOPS if decoder.own_products else _CHECK_FLOPS
    flops = bounds[torch.device(decoder.device).type]
    most = max(3 * PADDED_ROWS, min(512, int(flops / (2 * elements)) // PADDED_ROWS * PADDED_ROWS))
    generator = torch.Generator().manual_seed(0)
    for product in products:
        x = torch.randn(most, product.num_inputs, generator=generator).to(decoder.device, decoder.dtype)
        full = product(x)
        for rows in sorted({-(-few // multiple) * multiple for few in _FEW}):
            for start in range(0, most - rows, -(-most // _PLACES)):
                part = slice(start, start + rows)
                if not torch.equal(product(x[part]), full[part]):
                    return False
    return True
