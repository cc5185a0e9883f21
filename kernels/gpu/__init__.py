"""The `triton` set: kernels for NVIDIA GPUs from compute capability 8.0 on, behind the contract of `kernels`.

Owns which of them a device can run. Without a GPU they run in Triton's interpreter, slowly: for tests and for
finding faults. TRITON_INTERPRET=1 in the environment decides that, once, when triton is first imported.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton.language as tl
from triton.runtime.jit import JITFunction

from kernels import Kernels, Sharing
from kernels.attending import LIMITS
from kernels.gpu.activation import act, act_mul, softcap
from kernels.gpu.advance import advance
from kernels.gpu.cache import store_kv
from kernels.gpu.fp8_matmul import fp8_matmul
from kernels.gpu.int4_matmul import int4_matmul
from kernels.gpu.launch import paged_attention
from kernels.gpu.look_up import look_up
from kernels.gpu.matmul import matmul
from kernels.gpu.mixture import mix_experts
from kernels.gpu.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from kernels.gpu.norm_rope_store import norm_rope_store
from kernels.gpu.normalisers import normalisers
from kernels.gpu.penalties import count_tokens, penalise
from kernels.gpu.rope import rope
from kernels.gpu.sampling import sample
from kernels.weights import Float4Weight, Float8Experts, Float8Weight, Int4Experts, Int4Weight

OLDEST = (8, 0)  # the first with bfloat16 in its tensor cores
OLDEST_FP8 = (8, 9)  # the first that converts and multiplies fp8

INTERPRETED = not isinstance(tl.sum, JITFunction)
if INTERPRETED:
    from kernels.gpu import interpreter

    interpreter.repair()

KERNELS = Kernels(
    name="triton",
    quantised=tuple(LIMITS),
    rms_norm=rms_norm,
    add_rms_norm=add_rms_norm,
    rope=rope,
    store_kv=store_kv,
    norm_rope_store=norm_rope_store,
    layer_norm=layer_norm,
    add_layer_norm=add_layer_norm,
    act=act,
    act_mul=act_mul,
    softcap=softcap,
    paged_attention=paged_attention,
    sample=sample,
    normalisers=normalisers,
    penalise=penalise,
    count_tokens=count_tokens,
    look_up=look_up,
    advance=advance,
    matmul=matmul,
    int4_matmul=int4_matmul,
    fp8_matmul=fp8_matmul,
    mix_experts=mix_experts,
    keeps=(Int4Weight, Int4Experts, Float8Weight, Float8Experts, Float4Weight),
    sharing=Sharing(least_tokens=512, least_rows=4, exact=False),  # the first splits are so long
    keys_by_token=True,
)


def kernels(device: str) -> Kernels:
    """The set as the device can run it. Raises `ValueError` where it cannot."""
    on = torch.device(device)
    if on.type == "cpu":
        if not INTERPRETED:
            raise ValueError(
                "the triton kernels need a GPU; on a cpu they run only in triton's interpreter: "
                "set TRITON_INTERPRET=1 before triton is imported"
            )
        return KERNELS
    if on.type != "cuda" or torch.version.hip is not None:
        raise ValueError(f"the triton kernels cannot run on {device}: they are for NVIDIA GPUs")
    capability = torch.cuda.get_device_capability(on)
    if capability < OLDEST:
        raise ValueError(
            f"the triton kernels need a compute capability of at least {OLDEST}, not {capability} as {device} has"
        )
    if capability >= OLDEST_FP8:
        return KERNELS
    return replace(KERNELS, quantised=(torch.int8,), keeps=(Int4Weight, Int4Experts, Float4Weight))
