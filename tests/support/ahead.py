"""Compiles every kernel of the triton set for a GPU that need not be there, and says what it takes.

The kernels are those that the set's own functions launch for a list of cases: a driver that only names a target
stands where a GPU's would. Figures come from ptxas and cuobjdump, which triton brings, run on what was compiled.
Runs in a process of its own, because there triton must not be in interpreter mode:
`python -m tests.support.ahead sm_90 --dims 128 --parts attention` prints one JSON object per kernel.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from kernels import Attention, DecodingRows, Filters, HeadNorms, PagedKV, Penalties, SharedPrefixes
from kernels.gpu import KERNELS, grouped_matmul, launch
from kernels.gpu.fp8_matmul import fp8_matmul
from kernels.gpu.int4_matmul import int4_matmul, int4_plain
from kernels.gpu.mixture import mix_experts
from kernels.mixture import Mixture
from kernels.weights import ExpertsWeight, Float4Weight, Float8Experts, Float8Weight, Int4Experts, Int4Weight

# there the package has its functions under these names
PRODUCTS, FLOATS = (importlib.import_module(f"kernels.gpu.{name}") for name in ("matmul", "fp8_matmul"))
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
STORAGES = {"plain": None, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class NoDevice:
    """What triton asks of a driver before it launches."""

    def __init__(self, capability: int) -> None:
        self.get_current_target = lambda: GPUTarget("cuda", capability, 32)
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device=0: 0


def compiled(calls: Callable[[], object], but: Callable[[str], bool] = lambda _: False) -> list[Any]:
    """The kernels that `calls` would launch, compiled, `but` some by their names. Nothing runs."""
    found: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        if not but(self.fn.__name__):
            found.append(run(self, *args, grid=grid, warmup=True, **options))

    JITFunction.run = compile_only
    try:
        calls()
    finally:
        JITFunction.run = run
    return found


def figures(kernel: Any) -> dict[str, Any]:
    """Registers of a thread, bytes that a thread spills, bytes of shared memory of a block: what ptxas tells of the
    PTX that triton gave it, under the same options. `products`: instructions of the tensor cores, without the rows
    and columns of their tiles."""
    target = re.search(r"^\.target (\w+)", kernel.asm["ptx"], re.MULTILINE)
    assert target
    ptxas = BINARIES / ("ptxas-blackwell" if target[1].startswith("sm_1") else "ptxas")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(kernel.asm["ptx"])
        told = subprocess.run(
            [ptxas, "-v", "--fmad=true", f"--gpu-name={target[1]}", source, "-o", Path(folder) / "kernel.cubin"],
            capture_output=True, text=True, check=True,
        ).stderr  # fmt: skip
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", told)
    registers = re.search(r"Used (\d+) registers", told)
    assert spills, told
    assert registers, told
    instructions = set(
        re.findall(r"wgmma\.mma_async[.\w]*|mma\.sync[.\w]*|tcgen05\.mma[.:\w]*", kernel.asm["ptx"])
    )
    return {
        "kernel": kernel.metadata.name,
        "registers": int(registers[1]),
        "spilled": int(spills[1]) + int(spills[2]),
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "products": sorted({re.sub(r"m\d+n\d+", "", name) for name in instructions}),
    }


def attention(
    dtype: torch.dtype,
    storage: torch.dtype | None,
    dim: int,
    group: int,
    how: Attention,
    page_size: int,
) -> Callable[[], object]:
    """Steps of long contexts, so that every kernel of attention is launched: one with starts, and one of a query a
    row where rows share prefixes, which a window would leave alone. The tensors are small: nothing reads them."""
    kv_heads, pages = 2, 64
    kind = storage or dtype
    scales = [torch.empty(1, kv_heads, page_size, dtype=torch.bfloat16) for _ in range(2 if storage else 0)]
    cache = PagedKV(
        torch.empty(1, kv_heads, page_size, dim, dtype=kind).transpose(2, 3),
        torch.empty(1, kv_heads, page_size, dim, dtype=kind),
        *scales,
    )
    q = torch.empty(16, (group + 2) * kv_heads, dim, dtype=dtype)[:, : group * kv_heads]
    table = torch.empty(16, pages, dtype=torch.int32)
    starts, lens = torch.empty(17, dtype=torch.int32), torch.empty(16, dtype=torch.int32)
    slots, angles = torch.empty(16, dtype=torch.int64), torch.empty(16, dim // 2)
    k, norms = q[:, :kv_heads], HeadNorms(q[0, 0], q[0, 0], 1e-5)
    shared = SharedPrefixes(lens, lens, starts[:9])
    fused = KERNELS.norm_rope_store
    assert fused is not None

    def calls() -> None:
        KERNELS.paged_attention(q, cache, table, starts, lens, how)
        KERNELS.paged_attention(q, cache, table, None, lens, replace(how, window=None), shared)
        KERNELS.store_kv(k, k, cache, slots)
        fused(q, k, k, norms, (angles, angles), cache, slots)
        fused(q, k, k, norms, None, cache, slots)
        fused(q, k, k, None, (angles[:, :12], angles[:, :12]), cache, slots)

    return calls


def options(heads: int) -> dict[str, Attention]:
    return {
        "causal": Attention(0.1),
        "window": Attention(0.1, window=128),
        "softcap": Attention(0.1, softcap=50.0),
        "slopes": Attention(0.1, slopes=torch.empty(heads)),
        "sinks": Attention(0.1, window=128, sinks=torch.empty(heads)),
        "all": Attention(0.1, window=128, softcap=50.0, slopes=torch.empty(heads), sinks=torch.empty(heads)),
    }


def rowwise(dtype: torch.dtype) -> Callable[[], object]:
    x, w = torch.empty(16, 4096, dtype=dtype), torch.empty(4096, dtype=dtype)
    narrow, odd = torch.empty(64, 128, dtype=dtype), torch.empty(16, 12001, dtype=dtype)
    heads, angles = torch.empty(16, 32, 128, dtype=dtype), torch.empty(16, 64)

    def calls() -> None:
        KERNELS.rms_norm(x, w, 1e-5)
        KERNELS.rms_norm(narrow, w[:128], 1e-5)
        KERNELS.rms_norm(odd, odd[0], 1e-5)
        KERNELS.add_rms_norm(x, x, w, 1e-5)
        KERNELS.layer_norm(x, w, None, 1e-5)
        KERNELS.add_layer_norm(x, x, w, w, 1e-5)
        KERNELS.rope(heads, heads[:, :8], angles, angles)
        for activation in ("silu", "gelu", "gelu_tanh", "relu"):
            KERNELS.act(x, activation)
            KERNELS.act_mul(x, activation)
        KERNELS.act_mul(x, "swiglu_oai")
        KERNELS.softcap(x, 30.0)
        for tables in ((), ((angles, angles),), ((angles, angles), (angles, angles))):
            KERNELS.look_up(torch.empty(16, dtype=torch.int64), torch.empty(16, dtype=torch.int64), x, tables)

    return calls


def sampling(dtype: torch.dtype) -> Callable[[], object]:
    """Vocabularies of one block and of many, whose rows are aligned and are not; sampling as the engine asks for it,
    with filters and without, and with temperatures of fp32; what logprobs are made with,
    penalties, and the way to the next step."""
    seeds, heat = torch.empty(16, dtype=torch.int64), torch.empty(16, dtype=torch.float64)
    filters = Filters(seeds, heat, heat)
    ids, factors = torch.empty(16, 4096, dtype=torch.int32), heat.float()
    lengths = ids[:, 0].contiguous()
    penalties = Penalties(ids, ids, lengths, factors, factors, factors)
    kept = torch.empty(16, 16, dtype=torch.int64), torch.empty(16, 16)
    rows = DecodingRows(seeds, seeds, seeds, ids, 64, seeds, seeds, seeds, lengths, *kept)

    def calls() -> None:
        for vocab in (1000, 49152, 151936, 262145):
            KERNELS.sample(torch.empty(16, vocab, dtype=dtype), heat, seeds, seeds)
            KERNELS.sample(torch.empty(16, vocab, dtype=dtype), heat, seeds, seeds, filters)
            KERNELS.normalisers(torch.empty(16, vocab, dtype=dtype))
        KERNELS.penalise(torch.empty(16, 49152), penalties)
        KERNELS.count_tokens(penalties, seeds)
        KERNELS.sample(torch.empty(16, 49152, dtype=dtype), heat.float(), seeds, seeds, filters)
        logits = torch.empty(16, 49152, dtype=dtype)
        KERNELS.advance(rows, None)
        KERNELS.advance(rows, seeds)
        KERNELS.advance(rows, seeds, logits, KERNELS.normalisers(logits))

    return calls


def products(dtype: torch.dtype) -> Callable[[], object]:
    """Every tile, segments together and apart, and rows that no block divides."""

    def calls() -> None:
        for outputs, inputs in ((1024, 2048), (6144, 1024), (16384, 256), (100, 37), (1024, 4104)):
            weight, bias = torch.empty(outputs, inputs, dtype=dtype), torch.empty(outputs, dtype=dtype)
            for tokens in (16, 300, 8192):
                PRODUCTS.matmul(torch.empty(tokens, inputs, dtype=dtype), weight, bias)

    return calls


PLAIN_MIXTURES = (  # experts, hidden, inner, of which a token takes
    (8, 4096, 14336, 2),
    (128, 2048, 768, 8),
    (60, 100, 36, 4),
    (32, 2880, 2880, 4),
    (1, 1024, 256, 1),  # as the check of products at load asks
)
MIXTURES = {
    "plain": PLAIN_MIXTURES,
    "4 bits": ((8, 4096, 14336, 2), (60, 96, 160, 4), (32, 2880, 2880, 4), (1, 2880, 2880, 1)),
    "integers": ((128, 2048, 768, 8), (60, 128, 384, 4), (1, 2048, 768, 1)),
    "8 bits": ((128, 2048, 768, 8), (60, 112, 48, 4), (32, 2880, 2880, 4), (1, 2048, 768, 1)),
    "8 bits in blocks": ((128, 2048, 768, 8), (60, 112, 48, 4), (32, 2880, 2880, 4), (1, 2048, 768, 1)),
}


def mixtures(dtype: torch.dtype, kind: str) -> Callable[[], object]:
    """Every tile of the products of experts, few of them and many, and what routes to them and back. With biases:
    those of gpt-oss's shape, since odd widths take all registers already. `kind`: of `MIXTURES`."""

    def calls() -> None:
        for experts, hidden, inner, num_per_token in MIXTURES[kind]:
            some, biased = torch.empty(1, dtype=dtype), hidden == inner
            mixture = Mixture(
                gate_up=of_experts(experts, 2 * inner, hidden, dtype, kind),
                down=of_experts(experts, hidden, inner, dtype, kind),
                gate_up_bias=some.expand(experts, 2 * inner) if biased else None,
                down_bias=some.expand(experts, hidden) if biased else None,
                activation="swiglu_oai" if biased else "silu",
                num_per_token=num_per_token,
                normalised=True,
            )
            for tokens in (16, 8192):
                x = torch.empty(tokens, hidden, dtype=dtype)
                mix_experts(x, torch.empty(tokens, experts, dtype=dtype), mixture)

    return calls


def of_experts(
    experts: int, outputs: int, inputs: int, dtype: torch.dtype, kind: str
) -> torch.Tensor | ExpertsWeight:
    """Weights that take no memory."""
    if kind == "plain":
        return torch.empty(1, dtype=dtype).expand(experts, outputs, inputs)
    if kind == "4 bits":
        words, scales = torch.empty(4, dtype=torch.int32), torch.empty(1, dtype=torch.uint8)
        places = experts, inputs // 32, outputs
        return Float4Weight(words.expand(*places, 4), scales.expand(places))
    if kind == "integers":  # half a block to a group, or a block
        words, groups = torch.empty(1, dtype=torch.int32), inputs // (64 if experts == 60 else 128)
        places = experts, inputs // 128, 16, outputs
        return Int4Experts(words.expand(places), words.expand(experts, groups, outputs), torch.float16)
    floats, scale = torch.empty(1, dtype=torch.float8_e4m3fn), torch.empty(1)
    of_each = (outputs,) if kind == "8 bits" else (-(-outputs // 128), -(-inputs // 128))
    return Float8Experts(floats.expand(experts, outputs, inputs), scale.expand(experts, *of_each))


def quantised(dtype: torch.dtype) -> Callable[[], object]:
    """Every tile of products with weights of 4 bits, groups of parts of a block and of several, and the way to a
    plain weight."""

    def calls() -> None:
        for outputs, inputs, group in ((1024, 2048, 128), (24576, 256, 256), (100, 4096, 32)):
            weight = Int4Weight.empty(outputs, inputs, group, scale=torch.float16, device="cpu")
            bias = torch.empty(outputs, dtype=dtype)
            for tokens in (1, 32, 100):
                int4_matmul(torch.empty(tokens, inputs, dtype=dtype), weight, bias)
            int4_matmul(torch.empty(300, inputs, dtype=dtype), weight, None, invariant=True)
            int4_plain(weight, dtype)

    return calls


def quantised_to_8(dtype: torch.dtype) -> Callable[[], object]:
    """Products with weights of 8 bits: scales of outputs and of blocks, both tiles, segments together and apart."""

    def calls() -> None:
        for outputs, inputs in ((1024, 2048), (24576, 256), (100, 208)):
            for blocks in (False, True):
                weight = Float8Weight.empty(outputs, inputs, blocks=blocks, device="cpu")
                for tokens in (1, 100, 300):
                    fp8_matmul(
                        torch.empty(tokens, inputs, dtype=dtype), weight, torch.empty(outputs, dtype=dtype)
                    )

    return calls


def cases(chosen: argparse.Namespace, fp8: bool) -> Iterator[tuple[dict[str, Any], Callable[[], object]]]:
    for name in chosen.dtypes:
        if "rowwise" in chosen.parts:
            yield {"dtype": name}, rowwise(DTYPES[name])
        if "sampling" in chosen.parts:
            yield {"dtype": name}, sampling(DTYPES[name])
        if "products" in chosen.parts:
            yield {"dtype": name}, products(DTYPES[name])
        if "mixtures" in chosen.parts:
            for kind in MIXTURES:
                if fp8 or not kind.startswith("8"):
                    yield {"dtype": name, "experts": kind}, mixtures(DTYPES[name], kind)
        if "quantised" in chosen.parts:
            yield {"dtype": name}, quantised(DTYPES[name])
            if fp8:
                yield {"dtype": name}, quantised_to_8(DTYPES[name])
        for storage in chosen.storages:
            if "attention" not in chosen.parts or (storage == "fp8" and not fp8):
                continue
            for dim in chosen.dims:
                for group in chosen.groups:
                    for option, how in options(2 * group).items():
                        if option not in chosen.options:
                            continue
                        about = {"dtype": name, "storage": storage, "dim": dim, "group": group}
                        for size in chosen.pages:
                            launched = attention(DTYPES[name], STORAGES[storage], dim, group, how, size)
                            yield about | {"option": option, "page": size}, launched


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=["sm_80", "sm_90", "sm_100"])
    parts = ["rowwise", "products", "mixtures", "quantised", "attention", "sampling"]
    parser.add_argument("--parts", nargs="+", default=parts)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES))
    parser.add_argument("--storages", nargs="+", default=list(STORAGES))
    parser.add_argument("--dims", nargs="+", type=int, default=[64, 80, 128, 256])
    parser.add_argument("--groups", nargs="+", type=int, default=[1, 4, 7])
    parser.add_argument("--pages", nargs="+", type=int, default=[64])
    parser.add_argument("--options", nargs="+", default=list(options(1)))
    parser.add_argument("--once", action="store_true", help="of each kernel only what is launched first")
    chosen = parser.parse_args()
    number = int(chosen.target.removeprefix("sm_"))
    driver.set_active(NoDevice(number))
    for module in (launch, PRODUCTS, FLOATS, grouped_matmul):
        module.capability = lambda _: divmod(number, 10)  # type: ignore[attr-defined]
    seen: set[str] = set()

    def seen_before(name: str) -> bool:
        known = name in seen
        seen.add(name)
        return known and chosen.once

    for about, calls in cases(chosen, fp8=number >= 89):
        for kernel in compiled(calls, seen_before):
            print(json.dumps({"target": chosen.target, **about, **figures(kernel)}), flush=True)


if __name__ == "__main__":
    main()
