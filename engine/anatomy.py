"""Anatomy: what a module of transformers is to us, found out before any weight is read.

Owns the trial of a model without weights, on torch's meta device: which modules ask for attention, with which
heads, over which tokens; and the refusal, by name and reason, of a model that our attention cannot serve. Knows no
pages and no files. A list of good architectures would be wrong with the next transformers, and its own flags do
not tell: some models never call the attention they are given, and answer wrongly without a word.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from engine.model_config import ModelConfig, UnsupportedCheckpoint
from engine.plug import Call, plain_name, plugged, witness_name, witness_rows

_TRIED_TOKENS = 5
# Results of these depend on how many rows there are, or on their order; see `runner` on determinism
_PRODUCTS = frozenset({"linear", "mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "convolution"})
_ORDERED = frozenset({"index_add", "index_add_", "scatter_add", "scatter_add_", "cumsum"})
# On a CPU torch computes the end of a piece of memory with another formula than the rest
_UNEVEN = frozenset({"gelu", "silu", "silu_", "sigmoid", "sigmoid_", "softplus", "elu", "mish", "rsqrt"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Anatomy:
    """`attentions`: names of the modules that ask for attention, in the order in which they ask. `trunk`: the name
    of the one that makes hidden states of tokens; what the model does with them afterwards is its head.

    `crowded_by` names what computes, outside of known linear maps and activations, something that may depend on
    the other tokens of the step; None: nothing does.
    """

    attentions: tuple[str, ...]
    trunk: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    crowded_by: str | None


def is_product(module: nn.Module) -> bool:
    """A linear map whose product `Fallback.distinct_products` shows."""
    from transformers.pytorch_utils import Conv1D

    return type(module) in (nn.Linear, Conv1D)


def is_activation(module: nn.Module) -> bool:
    """A function of each element alone."""
    return type(module).__module__ in ("transformers.activations", "torch.nn.modules.activation")


def dissect(model_config: ModelConfig, config: Any) -> Anatomy:
    """Try the model of transformers' `config`, on tokens that are not there.

    Raises `UnsupportedCheckpoint` with the reason why it cannot be run.
    """
    name = model_config.architecture
    audit = _Audit()
    try:
        model = _without_weights(config)
        if type(model).__name__ != name:
            raise UnsupportedCheckpoint(
                f"{name}: transformers takes a {config.model_type} for {type(model).__name__}"
            )
        with audit.watching(model):
            calls, logits = _tried(model, None)
        _refuse_calls(model_config, calls)
        if tuple(logits.shape) != (1, 2, model_config.vocab_size):
            raise UnsupportedCheckpoint(
                f"{name}: two logits of {model_config.vocab_size} tokens were asked for, and "
                f"{list(logits.shape)} came: it cannot leave out rows that sample nothing"
            )
        if audit.trunk is None:
            raise UnsupportedCheckpoint(f"{name}: its hidden states cannot be had apart from its head")
        model.set_attn_implementation(witness_name(model_config.max_position))
        _refuse_masks(model_config, _tried(model, torch.ones(1, _TRIED_TOKENS, dtype=torch.int64))[0])
    except UnsupportedCheckpoint:
        raise
    except Exception as error:  # anything may come out of foreign code
        what = str(error).strip().split("\n")[0]
        raise UnsupportedCheckpoint(
            f"{name}: transformers' code cannot be run with our attention ({type(error).__name__}: {what})"
        ) from error
    names = {module: found for found, module in model.named_modules()}
    q, k = calls[0].q, calls[0].k
    return Anatomy(
        attentions=tuple(names[call.module] for call in calls),
        trunk=names[audit.trunk],
        num_heads=q.shape[1],
        num_kv_heads=k.shape[1],
        head_dim=q.shape[3],
        crowded_by=audit.found,
    )


def _without_weights(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        # bfloat16: meta has no grouped products of experts in fp32
        return AutoModelForCausalLM.from_config(
            config, attn_implementation=plain_name(), dtype=torch.bfloat16, trust_remote_code=False
        ).eval()


def _tried(model: Any, mask: Tensor | None) -> tuple[list[Call], Tensor]:
    """What it asks of attention, and its logits."""
    calls: list[Call] = []

    def attention(call: Call) -> Tensor:
        calls.append(call)
        return call.q.new_empty(1, call.q.shape[2], call.q.shape[1], call.v.shape[3])

    tokens = torch.zeros(1, _TRIED_TOKENS, dtype=torch.int64, device="meta")
    with plugged(attention), torch.inference_mode():
        output = model(
            input_ids=tokens,
            position_ids=tokens,
            attention_mask=None if mask is None else mask.to("meta"),
            use_cache=False,
            logits_to_keep=torch.zeros(2, dtype=torch.int64, device="meta"),
        )
    return calls, output.logits


def _refuse_calls(config: ModelConfig, calls: list[Call]) -> None:
    name = config.architecture
    if len(calls) != config.num_layers or len({call.module for call in calls}) != len(calls):
        raise UnsupportedCheckpoint(
            f"{name}: transformers' code asks for attention {len(calls)} times in {config.num_layers} layers; "
            f"only models that ask once in every layer are supported (no state spaces, no attention of their own)"
        )
    first = calls[0]
    for call in calls:
        heads, kv_heads, dim = call.q.shape[1], call.k.shape[1], call.q.shape[3]
        if call.k.shape != call.v.shape or call.k.shape[3] != dim:
            raise UnsupportedCheckpoint(
                f"{name}: heads of {dim} channels for q, {call.k.shape[3]} for k and {call.v.shape[3]} for v "
                f"are not supported; they must be the same"
            )
        if (call.q.shape, call.k.shape) != (first.q.shape, first.k.shape) or heads % kv_heads:
            raise UnsupportedCheckpoint(f"{name}: layers whose attention has different shapes")
        if call.sinks is not None and call.sinks.shape != (heads,):
            raise UnsupportedCheckpoint(
                f"{name}: attention sinks of shape {list(call.sinks.shape)} are not supported; "
                f"they must be one number for each of {heads} heads"
            )
        if call.others:
            raise UnsupportedCheckpoint(f"{name}: attention with {min(call.others)} is not supported")
        if call.mask is not None:
            raise UnsupportedCheckpoint(f"{name}: masks of its own making are not supported")


def _refuse_masks(config: ModelConfig, calls: list[Call]) -> None:
    """Its masks must say what we do: every token before, within the window of the layer."""
    keys = torch.arange(config.max_position)[None, :]
    queries = witness_rows(config.max_position)[:, None]
    for call in calls:
        window = config.max_position if call.window is None else call.window
        expected = (keys <= queries) & (keys > queries - window)
        if call.mask is None or not torch.equal(call.mask.reshape(-1, config.max_position), expected):
            raise UnsupportedCheckpoint(
                f"{config.architecture}: a mask other than causal, with or without a sliding window, is not supported"
            )


class _Audit(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Looks at every operation; `found` names the first that may depend on the crowd, outside of known modules.
    `trunk` is the module that gives the whole model its hidden states."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: str | None = None
        self.trunk: nn.Module | None = None
        self._inside: list[nn.Module] = []
        self._known = 0  # of those inside, how many are known

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        hooks = []
        for module in model.modules():
            hooks.append(module.register_forward_pre_hook(self._enter))
            hooks.append(module.register_forward_hook(self._leave))
        with self:
            yield
        for hook in hooks:
            hook.remove()

    def _enter(self, module: nn.Module, _inputs: Any) -> None:
        self._inside.append(module)
        self._known += is_product(module) or is_activation(module)

    def _leave(self, module: nn.Module, _inputs: Any, output: Any) -> None:
        self._inside.pop()
        if len(self._inside) == 1 and hasattr(output, "last_hidden_state"):
            self.trunk = module
        self._known -= is_product(module) or is_activation(module)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if self.found is None and not self._known and self._depends_on_crowd(name, args):
            owner = type(self._inside[-1]).__name__ if self._inside else "the model"
            self.found = f"{name} in {owner}"
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _depends_on_crowd(name: str, args: Any) -> bool:
        if name in ("mm", "bmm") and args[0].shape[-1] == 1:  # positions · frequencies: nothing is summed
            return False
        if name == "rsqrt" and args[0].dtype == torch.float32:
            return False
        return name in _PRODUCTS | _ORDERED | _UNEVEN
