"""Assembly: named tensors become the parts of a decoder: its blocks, norms and products.

Owns which part takes which tensors, by the flags of a `ModelConfig` and the names of `parameters`. A tensor is taken
out of its table, so that a weight which its product keeps in another order frees the plain one at once. Knows no
files and no steps.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

from torch import Tensor

from engine.alibi import alibi_slopes
from engine.attention import SelfAttention
from engine.block import Block, ParallelBlock
from engine.experts import AllExperts, Experts, MixedExperts
from engine.linear import Linear
from engine.mlp import MLP, GatedMLP, PlainMLP
from engine.model_config import MixtureOfExperts, ModelConfig
from engine.norm import LayerNorm, Norm, RMSNorm
from engine.parameters import NORM_NAMES
from engine.quantised_linear import Int8Linear, QuantisedLinear
from kernels import Attention, Kernels
from kernels.mixture import Mixture
from kernels.weights import ExpertsWeight, KeptWeight


class Assembly:
    """`parameters` and `quantised`, by name, lose what is taken. `stacks`: all experts of a layer side by side, where
    the kernels mix them (`parameters.expert_stacks`); empty: each is an MLP of its own. `int8`: products are of 8-bit
    integers, but for those that choose experts."""

    def __init__(
        self,
        config: ModelConfig,
        kernels: Kernels,
        *,
        parameters: MutableMapping[str, Tensor],
        quantised: MutableMapping[str, KeptWeight],
        stacks: Mapping[str, Tensor | ExpertsWeight],
        device: str,
        int8: bool,
    ) -> None:
        self._config = config
        self._kernels = kernels
        self._parameters = parameters
        self._quantised = quantised
        self._stacks = stacks
        self._device = device
        self._int8 = int8

    def block(self, index: int) -> Block | ParallelBlock:
        """Layer `index`."""
        config, layer, places = self._config, f"model.layers.{index}", NORM_NAMES[self._config.norm_position]

        def norm_of(place: str) -> Norm | None:
            return self.norm(f"{layer}.{places[place]}") if place in places else None

        if config.parallel:
            return ParallelBlock(
                attention_norm=norm_of("attention"),
                attention=self._attention(index),
                mlp_norm=norm_of("mlp"),
                mlp=self._mlp(index),
                multiplier=config.residual_multiplier,
            )
        return Block(
            attention_norm=norm_of("attention"),
            attention=self._attention(index),
            out_norm=norm_of("out"),
            mlp_norm=norm_of("mlp"),
            mlp=self._mlp(index),
            down_norm=norm_of("down"),
            multiplier=config.residual_multiplier,
        )

    def norm(self, name: str) -> Norm:
        """Over the hidden channels, of the tensors `name`.weight and, if there is one, `name`.bias."""
        weight, bias = self._parameters.pop(f"{name}.weight"), self._parameters.pop(f"{name}.bias", None)
        if self._config.norm_kind == "rms":
            assert bias is None
            return RMSNorm(self._kernels, weight, self._config.norm_eps, self._config.norm_offset)
        return LayerNorm(self._kernels, weight, bias, self._config.norm_eps)

    def product(self, name: str) -> Linear:
        """With `name`.weight `[out, in]`, quantised or not, and, if there is one, `name`.bias `[out]`."""
        weight, bias = self._parameters.pop(f"{name}.weight"), self._parameters.pop(f"{name}.bias", None)
        kept = self._quantised.pop(f"{name}.weight", None)
        if kept is not None:
            assert not isinstance(kept, ExpertsWeight)  # those are of stacks
            return QuantisedLinear(kept, bias, self._kernels)
        return self.linear(weight, bias, plain=name.endswith(".mlp.gate"))

    def linear(self, weight: Tensor, bias: Tensor | None, *, plain: bool = False) -> Linear:
        """With a weight `[out, in]` that is in no table any more. `plain`: never of 8-bit integers."""
        kind = Int8Linear if self._int8 and not plain else Linear
        return kind(weight, bias, self._kernels)

    def _attention(self, index: int) -> SelfAttention:
        config, part = self._config, f"model.layers.{index}.self_attn"
        return SelfAttention(
            kernels=self._kernels,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rotary_dim=0 if index in config.no_rope_layers else config.rotary_dim,
            how=self._how(index),
            qkv=self.product(f"{part}.qkv_proj"),
            q_norm=self._head_norm(f"{part}.q_norm"),
            k_norm=self._head_norm(f"{part}.k_norm"),
            out=self.product(f"{part}.o_proj"),
        )

    def _how(self, index: int) -> Attention:
        config = self._config
        scale = config.head_dim**-0.5 if config.attention_multiplier is None else config.attention_multiplier
        slopes = None
        if config.positions == "alibi":
            slopes = (alibi_slopes(config.num_heads) * scale).to(self._device)
        sinks = self._parameters.pop(f"model.layers.{index}.self_attn.sinks", None)
        return Attention(
            scale,
            window=config.window(index),
            softcap=config.attention_softcap,
            slopes=slopes,
            sinks=None if sinks is None else sinks.float(),
        )

    def _mlp(self, index: int) -> MLP | AllExperts:
        part, moe = f"model.layers.{index}.mlp", self._config.moe
        if moe is None or index in moe.dense_layers:
            return self._one_mlp(part)
        router = self.product(f"{part}.gate")
        if self._stacks:
            return self._mixture(router, f"{part}.experts", moe)
        return Experts(
            router,
            tuple(self._one_mlp(f"{part}.experts.{expert}") for expert in range(moe.num_experts)),
            num_per_token=moe.num_per_token,
            normalised=moe.normalised,
        )

    def _mixture(self, router: Linear, part: str, moe: MixtureOfExperts) -> MixedExperts:
        for expert in range(moe.num_experts):
            for name in ("gate_up_proj", "down_proj"):
                del self._parameters[f"{part}.{expert}.{name}.weight"]
                self._quantised.pop(f"{part}.{expert}.{name}.weight", None)
                self._parameters.pop(f"{part}.{expert}.{name}.bias", None)
        for name in ("gate_up_proj", "down_proj"):
            self._quantised.pop(f"{part}.{name}.weight", None)  # the same as in `stacks`
        mixture = Mixture(
            gate_up=self._stacks[f"{part}.gate_up_proj.weight"],
            down=self._stacks[f"{part}.down_proj.weight"],
            gate_up_bias=self._biases(f"{part}.gate_up_proj"),
            down_bias=self._biases(f"{part}.down_proj"),
            activation=self._config.activation,
            num_per_token=moe.num_per_token,
            normalised=moe.normalised,
        )
        assert self._kernels.mix_experts is not None
        return MixedExperts(router, mixture, self._kernels.mix_experts)

    def _biases(self, name: str) -> Tensor | None:
        """Of all experts, `[E, out]`, if they have some."""
        found = self._stacks.get(f"{name}.bias")
        assert found is None or isinstance(found, Tensor)
        return found

    def _one_mlp(self, part: str) -> MLP:
        name = "gate_up_proj" if self._config.gated_mlp else "up_proj"
        up, down = self.product(f"{part}.{name}"), self.product(f"{part}.down_proj")
        if self._config.gated_mlp:
            return GatedMLP(self._kernels, self._config.activation, up, down)
        assert self._config.activation != "swiglu_oai"  # gated by what it is
        return PlainMLP(self._kernels, self._config.activation, up, down)

    def _head_norm(self, name: str) -> RMSNorm | None:
        """Of q or k. None: this model has no such norm."""
        weight = self._parameters.pop(f"{name}.weight", None)
        if weight is None:
            return None
        return RMSNorm(self._kernels, weight, self._config.norm_eps, self._config.norm_offset)
