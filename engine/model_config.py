"""What shape one decoder has (`ModelConfig`), and the refusal of files that have none of ours.

Owns sizes and flags, of the model and of how its checkpoint lays tensors out. Knows neither where they were read from
(`families`, `checkpoint`) nor what is computed with them (`model`). No torch: dtypes are strings here, so that the
worker can read a model's limits without loading it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

StoredDType = Literal["bfloat16", "float16", "float32"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


class UnsupportedCheckpoint(ValueError):
    """These files cannot be run, and the message says why. Raised before any weight is read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """Rotary frequency scaling; each `kind` uses some of the fields."""

    kind: Literal["linear", "llama3", "yarn", "longrope"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    beta_fast: float = 32.0  # yarn: rotations over the original context from which on a channel is kept
    beta_slow: float = 1.0  # yarn: rotations up to which a channel is stretched by `factor`
    truncate: bool = True  # yarn: the bounds between those channels are rounded to whole numbers
    attention_factor: float = 1.0  # of cosines and sines
    short_factors: tuple[float, ...] = ()  # longrope: of each pair of channels, within the original context
    long_factors: tuple[float, ...] = ()  # the same for an engine that goes beyond it


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """How a checkpoint names and lays out its tensors, where that is not Llama's way.

    `names`: regular expressions and what replaces them, applied in this order, which turn its names into Llama's.
    `derived`: a regular expression that finds the tensors of which nothing is needed: masks, or what sees images.
    """

    names: tuple[tuple[str, str], ...] = ()
    derived: str | None = None
    # q, k, v: three tensors; one, q above k above v; or one, for each kv head its q heads, its k and its v
    qkv: Literal["apart", "stacked", "grouped"] = "apart"
    # which of a head's rotated channels turn together: i and i + half of them, or 2·i and 2·i + 1
    rotary: Literal["halves", "pairs"] = "halves"
    gate_up: Literal["apart", "stacked"] = "apart"
    # one tensor of all experts of a layer: [E, out, in], gate above up; or [E, in, out], a gate before each up
    experts: Literal["stacked", "alternating"] = "stacked"
    transposed: bool = False  # the products of blocks are [in, out]


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureOfExperts:
    """A router sends each token to a few of many MLPs and adds what they make, by its shares."""

    num_experts: int
    num_per_token: int
    intermediate_size: int  # of one expert
    normalised: bool  # the shares of a token's experts are divided by their sum
    router_bias: bool = False
    dense_layers: tuple[int, ...] = ()  # indices of the layers that have one plain MLP instead


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Sizes and flags of one decoder. Families are data: no code branches on a name."""

    architecture: str  # as the checkpoint calls it, e.g. LlamaForCausalLM
    definition: Literal["nightpress", "transformers"] = "nightpress"  # whose code computes it
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    partial_rotary_factor: float = 1.0  # the share of each head's channels that is rotated: the first ones
    # how a token knows its place: by rotation, from a table, or by slopes added before scores are scaled
    positions: Literal["rope", "learned", "alibi"] = "rope"
    storage: Storage = Storage()
    tied_embeddings: bool = False
    qkv_bias: bool = False
    out_bias: bool = False  # of the attention's output product
    mlp_bias: bool = False
    qk_norm: Literal["head", "all"] | None = None  # of q and k before rotation: each head, or all as one
    norm_kind: Literal["rms", "layer"] = "rms"
    norm_bias: bool = False
    norm_offset: float = 0.0  # what checkpoints leave out of the weights of RMS norms
    # of attention and MLP; both: before and after each; shared: one before the two
    norm_position: Literal["before", "after", "both", "shared"] = "before"
    # attention and MLP see the same residual; else the MLP sees what attention has added
    parallel: bool = False
    # swiglu_oai: of gated MLPs alone
    activation: Literal[Activation, "swiglu_oai"] = "silu"
    gated_mlp: bool = True
    moe: MixtureOfExperts | None = None
    embedding_multiplier: float = 1.0
    rounds_embedding_multiplier: bool = False  # to the dtype of the activations, before it multiplies
    attention_multiplier: float | None = None  # of q · k; None: 1 / √head_dim
    residual_multiplier: float = 1.0  # of what attention and MLP add
    logits_scaling: float = 1.0  # logits are divided by it
    logits_softcap: float | None = None  # c: logits become c · tanh(logit / c)
    attention_softcap: float | None = None  # the same of attention's scores
    attention_sinks: bool = False  # each head has a score of no token, which takes weight and adds nothing
    # how many tokens a query of each layer sees, itself included; None: all of them; empty: all in every layer
    windows: tuple[int | None, ...] = ()
    windowed_rope_theta: float | None = None  # of layers with a window, unscaled; None: rotated as the others
    no_rope_layers: tuple[int, ...] = ()  # indices of the layers that rotate nothing
    dtype: StoredDType = "bfloat16"  # what the checkpoint stores
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    @property
    def rotary_dim(self) -> int:
        """Channels of each head that are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)

    def window(self, layer: int) -> int | None:
        """How many tokens a query of the layer sees at most, itself included; None: all of them."""
        return self.windows[layer] if self.windows else None

    def kv_bytes_per_token(self, dtype_bytes: int) -> int:
        """Bytes of K and V that one token occupies over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * dtype_bytes

    @property
    def kv_scale_bytes_per_token(self) -> int:
        """Bytes of the scales of one token in a cache of 8 bits: a bfloat16 per layer and head, for K and V."""
        return 2 * self.num_layers * self.num_kv_heads * 2
