"""The hyperbolic tangent, inside kernels.

Triton's own comes from a library of the device, which the interpreter does not have; the usual formula of
exponentials loses all digits near 0.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """x fp32 of any shape. Relative error below 5e-7; ±1 at ±infinity, NaN at NaN.

    Near 0 the polynomial of tanhf in Moshier's Cephes library, elsewhere 1 - 2 / (exp(2x) + 1).
    """
    y = x * x
    p = (((-5.70498872745e-3 * y + 2.06390887954e-2) * y - 5.37397155531e-2) * y + 1.33314422036e-1) * y
    near = x + x * y * (p - 3.33332819422e-1)
    far = 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)
    return tl.where(tl.abs(x) < 0.625, near, far)
