"""Products with floats of 4 bits in blocks with a scale each (`Float4Weight`), as parts of a kernel.

Owns how such weights become numbers of x's dtype in the registers of a program, and the loop over the inputs. Knows
no tiles and no groups (`grouped_matmul`). A weight becomes float · 2^(scale - 127), rounded to x's dtype once: in
bfloat16 and fp32 exactly, but that scales of 253 and 254 make some infinite. In fp16 others become infinite, too, and
small ones are rounded. A scale of 255 makes all NaN. A plain tensor of x's dtype would hold the same, and they go
through the same dots in the same order as in `matmul.accumulate`: no bit of a product is another one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.weights import FLOAT_BLOCK, PER_WORD

# the layout of `Float4Weight`, for kernels
SHARED_INPUTS, WORD_INPUTS = tl.constexpr(FLOAT_BLOCK), tl.constexpr(PER_WORD)
BLOCK_WORDS = tl.constexpr(FLOAT_BLOCK // PER_WORD)


@triton.jit
def _two(words, NUMBER: tl.constexpr):
    """[..., 2] bfloat16: inputs 2 · NUMBER and the next one of each word, less than they are by a factor of 2^126:
    the exponent of E2M1 in the last bits of one of 8 bits, which makes its half a subnormal number."""
    first = words << (4 * NUMBER)
    both = (first & -0x7FFF8000) | ((first & 0x70007000) >> 6)
    low, high = (both & 0xFFFF).to(tl.int16), (both >> 16).to(tl.int16)
    return tl.join(low.to(tl.bfloat16, bitcast=True), high.to(tl.bfloat16, bitcast=True))


@triton.jit
def _powers(scales):
    """2^(scale - 127) in bfloat16, which has them all: the first as a subnormal number."""
    wide = scales.to(tl.int32)
    bits = tl.where(wide == 255, 0x7FC0, tl.where(wide == 0, 0x0040, wide << 7))
    return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def dequantised(words, scales, DTYPE: tl.constexpr):
    """[inputs, columns] of DTYPE. words: [inputs / 8, columns] int32, scales: [inputs / 32, columns] uint8."""
    COLUMNS: tl.constexpr = words.shape[1]
    INPUTS: tl.constexpr = words.shape[0] * WORD_INPUTS
    # [inputs / 8, columns, 2, 2, 2]: its last indices count by 1, 2 and 4
    eight = tl.join(tl.join(_two(words, 0), _two(words, 1)), tl.join(_two(words, 2), _two(words, 3)))
    floats = tl.reshape(tl.permute(eight, (0, 4, 3, 2, 1)), (INPUTS // SHARED_INPUTS, SHARED_INPUTS, COLUMNS))
    # by 2^126: what they are, exactly
    floats *= tl.full((1, 1, 1), 0x7E80, tl.int16).to(tl.bfloat16, bitcast=True)
    powers = _powers(scales)[:, None, :]
    if DTYPE.is_bf16():
        weights = floats * powers
    else:
        weights = (floats.to(tl.float32) * powers.to(tl.float32)).to(DTYPE)
    return tl.reshape(weights, (INPUTS, COLUMNS))


@triton.jit
def accumulate_float4(
    acc, x, words, scales, blocks, outputs, held_rows, held_columns, WHOLE: tl.constexpr, DEPTH: tl.constexpr
):
    """acc [ROWS, COLUMNS] plus the products over all inputs, DEPTH at a time. x: pointers [ROWS, DEPTH], words:
    [DEPTH / 8, COLUMNS], scales: [DEPTH / 32, COLUMNS], all at input 0. Blocks of 32 inputs that share a scale lie
    `outputs` apart. WHOLE: DEPTH divides the inputs."""
    lane, shared = tl.arange(0, DEPTH), tl.arange(0, DEPTH // SHARED_INPUTS)
    word = tl.arange(0, DEPTH // WORD_INPUTS)
    # single bytes are not copied ahead by the pipeline of the loop
    powers = tl.load(scales, mask=held_columns & (shared < blocks)[:, None], other=0)
    for start in range(0, blocks, DEPTH // SHARED_INPUTS):
        after = start + DEPTH // SHARED_INPUTS
        next_powers = tl.load(
            scales + after * outputs, mask=held_columns & (after + shared < blocks)[:, None], other=0
        )
        if WHOLE:
            a = tl.load(x + start * SHARED_INPUTS, mask=held_rows, other=0.0)
            b = tl.load(words + start * outputs * BLOCK_WORDS, mask=held_columns, other=0)
        else:
            inside = lane < (blocks - start) * SHARED_INPUTS
            there = word < (blocks - start) * BLOCK_WORDS
            a = tl.load(x + start * SHARED_INPUTS, mask=held_rows & inside[None, :], other=0.0)
            b = tl.load(words + start * outputs * BLOCK_WORDS, mask=held_columns & there[:, None], other=0)
        acc = tl.dot(a, dequantised(b, powers, x.dtype.scalar.element_ty), acc, input_precision="ieee")
        powers = next_powers
    return acc
