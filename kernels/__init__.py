"""The operations of a decoder step, as one frozen value with one written contract.

Owns the contract and the choice of a set. Knows nothing of models, requests or pages' owners. A set is a
`Kernels` value handed down by whoever built it: no globals and no environment variables choose one, so two
models with different sets can live in one process.

Contract, for every set. T tokens, R rows (sequences), hq query heads, hk key/value heads, d head dimension,
P pages per row in the table. All tensors on one device; x, weights, q, k and v share one dtype.

- Sums, exponentials and divisions are in fp32; each result is rounded to the dtype once. A set may also round the
  weights of a softmax to the dtype before they meet V, as tensor cores take them.
- Every token's result depends on that token's inputs alone, never on T, R or the other rows (but for
  the rounding of attention with a `SharedPrefixes`, where a set's `Sharing` is not exact).
- The last dimension is contiguous; token rows may be strided (views of a wider matrix).
- T = 0 and R = 0 are allowed and do nothing.

Cache layout: `PagedKV`. Slot s is token `s % page_size` of page `s // page_size`. Slots that no row's context
covers may hold anything, NaN included. Nor does what a row stores behind a query, or before its window, reach that
query: NaN there changes no bit of its result. That is why V in a page is always finite: where V of a token's head has
NaN or infinity, K is stored as NaN and V as zeros, so every query that sees the token fails, and a weight of 0 hides
it from all others. Entries of the page table whose tokens no query of the row sees are not read: they need not be
pages.

A cache of 8 bits has one scale per token and kv head, for K and for V. The scale is the largest |x| over d
divided by 127 (int8) or 448 (fp8), rounded up to bfloat16 so that nothing clips; what is stored is x / scale,
rounded to nearest even, and it means stored · scale in fp32. A vector of zeros has scale 0. A vector with NaN or
infinity has scale NaN, so that the failure shows. A scale depends on the token's own vector alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from kernels.attending import Attention as Attention
from kernels.attending import PagedKV as PagedKV
from kernels.attending import SharedPrefixes as SharedPrefixes
from kernels.attending import Sharing as Sharing
from kernels.decoding import DecodingRows as DecodingRows
from kernels.weights import Float8Weight, Int4Weight, Int8Weight, KeptWeight, PackedWeight

if TYPE_CHECKING:
    from kernels.blocks import Fuse
    from kernels.mixture import MixExperts

logger = logging.getLogger(__name__)

KernelSet = Literal["auto", "reference", "cpu", "triton"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
GatedActivation = Activation | Literal["swiglu_oai"]
FAILED = -1  # in place of a token that `sample` cannot draw
Rotations = tuple[tuple[Tensor, Tensor], ...]  # (cos, sin) of each way to rotate, lines of one width in fp32


@dataclass(frozen=True, slots=True, eq=False)
class HeadNorms:
    """RMS norms of q and k, each head by itself, with `eps` and `offset` as in `rms_norm`."""

    q: Tensor  # [d] weight
    k: Tensor  # [d] weight
    eps: float
    offset: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Filters:
    """Which tokens each row of `sample` may draw where its temperature is above 0. Three filters, applied in this
    order, each to what the one before has left:

    - `min_p` m: a token stays if logit ≥ largest + temperature · ln(m): the likeliest token is then at most 1 / m
      times as likely (Nguyen et al. 2024). 0 is off.
    - `top_k` k: the first k stay. Tokens are ranked by logit, the largest first, equals by the lower id. 0 is off,
      and so is any k that is at least the size of the vocabulary.
    - `top_p` p: a token stays if the weights of those ranked before it sum to less than p times the weight of all
      that are left; the first one always (Holtzman et al. 2019). 1 is off.
    """

    top_k: Tensor  # [S] int64, at least 0
    top_p: Tensor  # [S] fp64, above 0 and at most 1
    min_p: Tensor  # [S] fp64, from 0 to 1


@dataclass(frozen=True, slots=True, eq=False)
class Penalties:
    """Which tokens each row of logits has seen, and what that does to their logits x: x / repetition where x is above
    0 and x · repetition elsewhere (Keskar et al. 2019), then less frequency · times, then less presence where times
    is above 0 (OpenAI), in fp32, each operation rounded by itself: all sets agree in every bit.

    A row lists its distinct tokens: a step then touches those, a few hundred, while a count for every token of the
    vocabulary would be as much to read as the logits are (256 rows of 152k tokens: 156 MB in int32). The first
    `lengths` entries of a row count; a row without any has no penalties. Rows may be strided.
    """

    token_ids: Tensor  # [S, N] int32, N at least 1
    times: Tensor  # [S, N] int32, how often each was generated; 0: it is in the prompt alone
    lengths: Tensor  # [S] int32
    repetition: Tensor  # [S] fp32, above 0
    frequency: Tensor  # [S] fp32
    presence: Tensor  # [S] fp32


class Normalisers(NamedTuple):
    """What turns a row's logits into logprobs, the logs of its softmax: (logit - largest) - log_sum, in fp32. Two
    numbers, because their sum would round away the logprob of a token that is nearly certain."""

    largest: Tensor  # [S] fp32, of the row's logits
    log_sums: Tensor  # [S] fp32, the log of the sum of exp(logit - largest)


class Sample(Protocol):
    def __call__(
        self,
        logits: Tensor,
        temperatures: Tensor,
        seeds: Tensor,
        positions: Tensor,
        filters: Filters | None = None,
    ) -> Tensor: ...


class RMSNorm(Protocol):
    def __call__(self, x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor: ...


class AddRMSNorm(Protocol):
    def __call__(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0
    ) -> tuple[Tensor, Tensor]: ...


class NormRopeStore(Protocol):
    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        norms: HeadNorms | None,
        rotation: tuple[Tensor, Tensor] | None,
        cache: PagedKV,
        slots: Tensor,
    ) -> None: ...


class Advance(Protocol):
    def __call__(
        self,
        rows: DecodingRows,
        drawn: Tensor | None,
        logits: Tensor | None = None,
        of: Normalisers | None = None,
    ) -> None: ...


class Int4Matmul(Protocol):
    def __call__(
        self, x: Tensor, weight: Int4Weight, bias: Tensor | None, *, invariant: bool = False
    ) -> Tensor: ...


class Fp8Matmul(Protocol):
    def __call__(
        self, x: Tensor, weight: Float8Weight, bias: Tensor | None, *, invariant: bool = False
    ) -> Tensor: ...


class PagedAttention(Protocol):
    def __call__(
        self,
        q: Tensor,
        cache: PagedKV,
        page_table: Tensor,
        query_start: Tensor | None,
        context_lens: Tensor,
        how: Attention,
        shared: SharedPrefixes | None = None,
    ) -> Tensor: ...


Matmul = Callable[[Tensor, Tensor | PackedWeight, Tensor | None], Tensor]


@dataclass(frozen=True, slots=True)
class Kernels:
    """One kernel set.

    - `rms_norm(x [T, H], weight [H], eps, offset=0) -> [T, H]`: x / sqrt(mean(x²) + eps) · (weight + offset)
      (Zhang and Sennrich 2019; Gemma stores its weights less 1).
    - `add_rms_norm(x [T, H], residual [T, H], weight [H], eps, offset=0) -> (normed [T, H], new residual [T, H])`:
      the new residual is x + residual rounded to the dtype, and that is what is normed. May overwrite `residual`.
    - `layer_norm(x [T, H], weight [H], bias [H] or None, eps) -> [T, H]`: (x - mean(x)) / sqrt(var(x) + eps)
      · weight + bias, with the variance of the H values themselves, not an estimate (Ba et al. 2016).
    - `add_layer_norm(x [T, H], residual [T, H], weight [H], bias [H] or None, eps)`: as `add_rms_norm`.
    - `rope(q [T, hq, d], k [T, hk, d], cos [T, d/2] fp32, sin [T, d/2] fp32)`: rotates in place; channel i
      is paired with channel i + d/2 (Su et al. 2021, in the half-split order of Hugging Face checkpoints).
      Heads may be strided as well: d is then the number of first channels that are rotated, the others stay.
    - `store_kv(k [T, hk, d], v [T, hk, d], cache, slots [T] int64)`: slot -1 is skipped.
    - `norm_rope_store(q [T, hq, d], k [T, hk, d], v [T, hk, d], norms or None, (cos, sin) or None, cache, slots)`:
      what `rms_norm` of each head of q and k, `rope` of the first 2 · `cos.shape[1]` channels and `store_kv` do one
      after another, each rounded to the dtype; None leaves its part out. q is changed in place, also where the slot
      is -1; k and v are not. They share no element. A set that gains nothing by it has None here.
    - `act(x [T, I], activation) -> [T, I]`, by name: `silu` x / (1 + exp(-x)); `gelu` x · Φ(x), Φ the normal
      distribution function; `gelu_tanh` x / 2 · (1 + tanh(√(2/π) · (x + 0.044715 x³))) (Hendrycks and Gimpel 2016);
      `relu` max(x, 0).
    - `act_mul(gate_up [T, 2I], activation) -> [T, I]`: act(first half) · second half (Shazeer 2020); `swiglu_oai`
      g / (1 + exp(-1.702 g)) · (u + 1), g the first half but at most 7, u the second but from -7 to 7 (gpt-oss).
    - `softcap(x [T, N], c) -> [T, N]`: c · tanh(x / c) (Gemma 2).
    - `paged_attention(q [T, hq, d], cache, page_table [R, P] int32, query_start [R+1] int32 or None, context_lens
      [R] int32, how: Attention, shared: SharedPrefixes or None) -> [T, hq, d]`: causal attention of a row's queries
      `query_start[r]:query_start[r+1]` over its first `context_lens[r]` tokens, of which those queries are
      the last ones and are already stored. Query head h reads kv head `h // (hq / hk)`. Rows of one token
      and of many mix freely. Tokens from `query_start[R]` on are padding: their result is zero. `query_start` None:
      every row has one query, T = R, and rows with a context of 0 are padding. `shared` (may be left out) is a hint.
      It changes results by rounding at most, which may then depend on the group; where `sharing` is exact it changes
      no bit. A set may use it for rows of which no window hides a token. Where `query_start` is given, only a set
      whose `sharing` is exact uses it, for the rows that have one query; other rows may be members, and gain nothing.
    - `sample(logits [S, vocab], temperatures [S] fp32 or fp64, seeds [S] int64, positions [S] int64, filters or
      None) -> [S] int64`:
      one token of each row, whose bits depend on that row alone. Temperature 0: the largest logit's, the lowest id
      of equals. Above: the first whose cumulative weight exceeds u times the total, where a weight is
      exp((logit - largest) / temperature) and u the number that `noise.uniforms` makes of seed and position. A
      token of weight 0 is never drawn, so a logit of -inf masks its token. `FAILED` where the largest logit is NaN
      (which any NaN of the row is) or infinite. Logits bf16, fp16 or fp32; u and the sums over a row fp32 or better.
      `filters` (may be left out) say which tokens may be drawn: the others have weight 0 and order and total are of
      those that are left. A row whose filters are all off draws as if there were none, bit for bit.
    - `normalisers(logits [S, vocab]) -> Normalisers`: of each row, whose bits depend on that row alone; logits as
      for `sample`. Where the largest logit is NaN or infinite the row's logprobs are not finite. Apart from `sample`,
      because a token is drawn from logits after masks and penalties, and its logprob is of those before them.
    - `penalise(logits [S, vocab] fp32, penalties)`: in place.
    - `count_tokens(penalties, tokens [S] int64)`: notes the tokens that rows have drawn, in place: one more time for
      a token that the row lists, else an entry at its end, if N leaves room. Not of a row without entries, and not
      of a negative token.
    - `look_up(token_ids [T] int64, positions [T] int64, embedding [vocab, H], tables) -> (x [T, H], rotations)`: the
      lines of the embedding, and of each of at most two pairs of tables [positions, d/2] fp32 those of the positions.
      All are contiguous.
    - `advance(rows: DecodingRows, drawn [S] int64 or None, logits [S, vocab] or None, of: Normalisers or None)`: of
      what a step has drawn to the input of the next one, in place. A token is kept in line `counts` of `made`, and
      its logprob (`of` has those of the raw `logits`; both may be left out) in that of `logprobs`; it becomes the
      row's last one, and length and count grow by one. A negative token is kept, and goes on as token 0. None:
      nothing was drawn, a launch begins, and counts become 0. Then `positions`, `slots` and `context_lens` are made.
    - `pack(weight [out, in]) -> PackedWeight`: the weight in the order in which `matmul` reads it best. None: that is
      the plain order.
    - `matmul(x [T, in], weight [out, in] or what `pack` made of it, bias [out] or None) -> [T, out]`: x · weightᵀ +
      bias. None: this set has no product of its own; whether the library's products keep the second rule above must
      then be checked.
    - `int4_matmul(x [T, in], weight, bias [out] or None, invariant=False) -> [T, out]`: x · weightᵀ + bias, as
      `Int4Weight` defines it; a set may round the weight to x's dtype. The second rule above holds where `invariant`.
    - `fp8_matmul(x [T, in], weight, bias [out] or None, invariant=False) -> [T, out]`: x₈ · weightᵀ + bias, as
      `Float8Weight` defines it, where x₈ is x rounded to E4M3 · scale: the scale is the largest |x| of the row, or,
      where the weight's scales are of blocks, of the row's inputs of the block, divided by 448, in fp32. A row
      or block with NaN or infinity becomes NaN. The second rule as above.
    - `quantise_int8(weight [out, in]) -> Int8Weight`: as `weights.rounded_to_int8` rounds it. None: the set has no
      products of 8-bit integers.
    - `int8_matmul(x [T, in], weight: Int8Weight, bias [out] or None) -> [T, out]`: x is rounded to integers, row by
      row as a weight is output by output; the integers' products are summed exactly, then multiplied by (the scale
      of the output · that of the row) in fp32, then comes the bias. A row with NaN or infinity becomes NaN.
    - `mix_experts(x [T, H], logits [T, E], mixture) -> [T, H]`: a mixture of experts as one operation, as `mixture`
      defines it. None: the set has none, and experts are computed one by one.
    - `fuse(blocks) -> FusedBlocks`: all blocks of a decoder as one operation, as `blocks` defines it. None: the set
      gains nothing by it.

    `quantised` names the dtypes of 8-bit caches that the set serves; `keeps` the weights that are better left
    quantised for it than made plain beforehand; `multiplies` the dtypes whose products are better left to `matmul`
    than to the library; `sharing` what it makes of a `SharedPrefixes`, None: nothing; `keys_by_token` how K lies in
    its pages (`PagedKV`).
    """

    name: str
    quantised: tuple[torch.dtype, ...]
    rms_norm: RMSNorm
    add_rms_norm: AddRMSNorm
    rope: Callable[[Tensor, Tensor, Tensor, Tensor], None]
    store_kv: Callable[[Tensor, Tensor, PagedKV, Tensor], None]
    layer_norm: Callable[[Tensor, Tensor, Tensor | None, float], Tensor]
    add_layer_norm: Callable[[Tensor, Tensor, Tensor, Tensor | None, float], tuple[Tensor, Tensor]]
    act: Callable[[Tensor, Activation], Tensor]
    act_mul: Callable[[Tensor, GatedActivation], Tensor]
    softcap: Callable[[Tensor, float], Tensor]
    paged_attention: PagedAttention
    sample: Sample
    normalisers: Callable[[Tensor], Normalisers]
    penalise: Callable[[Tensor, Penalties], None]
    count_tokens: Callable[[Penalties, Tensor], None]
    look_up: Callable[[Tensor, Tensor, Tensor, Rotations], tuple[Tensor, Rotations]]
    advance: Advance
    int4_matmul: Int4Matmul
    fp8_matmul: Fp8Matmul
    keeps: tuple[type[KeptWeight], ...] = ()
    norm_rope_store: NormRopeStore | None = None
    matmul: Matmul | None = None
    pack: Callable[[Tensor], PackedWeight] | None = None
    multiplies: tuple[torch.dtype, ...] = ()
    quantise_int8: Callable[[Tensor], Int8Weight] | None = None
    int8_matmul: Callable[[Tensor, Int8Weight, Tensor | None], Tensor] | None = None
    mix_experts: MixExperts | None = None
    fuse: Fuse | None = None
    sharing: Sharing | None = None
    keys_by_token: bool = False


def kernels_for(device: str, name: KernelSet = "auto", *, dtype: torch.dtype = torch.bfloat16) -> Kernels:
    """The set for a device. `auto` takes `cpu` on a CPU and `triton` on a GPU, and `reference` where that cannot run.

    Raises `ValueError` for a name that is unknown or cannot run on the device. Asking for `cpu` where no
    C compiler works gives `reference`, with a warning in the log, because the answers are the same.
    """
    from kernels import reference

    if name not in ("auto", "reference", "cpu", "triton"):
        raise ValueError(f"kernels must be auto, reference, cpu or triton, not {name!r}")
    on_cpu = torch.device(device).type == "cpu"
    if name == "cpu" and not on_cpu:
        raise ValueError(f"the cpu kernels cannot run on {device}")
    if name == "triton":
        return _triton(device)
    if name == "auto" and not on_cpu:
        try:
            return _triton(device)
        except ValueError as error:
            logger.warning("using the slow reference set: %s", error)
    if name == "reference" or not on_cpu or dtype not in (torch.bfloat16, torch.float32):
        return reference.KERNELS

    from kernels import cpu

    try:
        return cpu.kernels()
    except cpu.BuildError as error:
        logger.warning("cpu kernels unavailable, using the slow reference set: %s", error)
        return reference.KERNELS


def _triton(device: str) -> Kernels:
    """Raises `ValueError` where it cannot run."""
    if find_spec("triton") is None:
        raise ValueError("the triton kernels need triton: pip install 'nightpress[gpu]'")

    from kernels import gpu

    return gpu.kernels(device)
