"""Fallback: a decoder whose code is transformers' own, with our paged KV cache behind its attention.

Owns a step of packed sequences as one forward pass of its module. Same interface as `model.Decoder`; which
architectures can be had is found by `anatomy`, not listed, and `foreign_module` loads them. Slower than a family of
our own: norms, rotations and activations are plain torch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from engine.anatomy import Anatomy, dissect, is_activation, is_product
from engine.cache import KVCache
from engine.checkpoint import Checkpoint
from engine.foreign_module import configuration, loaded_module, quiet
from engine.model_config import ModelConfig
from engine.plug import Call, plain_name, plugged
from engine.rehearsal import rehearse
from engine.step_input import StepInput
from kernels import Attention, Kernels

_PIECE = 2**14  # elements: so many torch computes in one piece, whatever the activation
_VECTORS = 64  # elements: every vector loop of torch's CPU code takes a divisor of it at a time


class Product:
    """A linear map of the module, as a check of products wants it: x `[T, in]` → `[T, out]`."""

    __slots__ = ("_module", "num_inputs", "num_outputs")

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        assert isinstance(module.weight, Tensor)
        rows, columns = module.weight.shape
        stored_as_ours = isinstance(module, nn.Linear)
        self.num_outputs, self.num_inputs = (rows, columns) if stored_as_ours else (columns, rows)

    def __call__(self, x: Tensor) -> Tensor:
        product: Tensor = self._module(x[None])[0]  # with a batch of one, as in a step
        return product


class Elementwise(nn.Module):
    """An activation whose result for an element never depends on where in memory the element lies.

    torch's CPU code computes what does not fill a vector at the end of a piece with another formula, and cuts
    pieces by size and threads, so a token's bits would depend on its crowd.
    """

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[-1]
        rows = x.reshape(-1, width)
        together = 1 if width % _VECTORS else max(1, _PIECE // width)
        if rows.shape[0] <= together:
            result: Tensor = self.activation(x.contiguous())
            return result
        return torch.cat([self.activation(piece) for piece in torch.split(rows, together)]).view(x.shape)


class Fallback:
    """Made by `load`; then `prepare` once. Attributes are read-only."""

    own_products = False
    capturable = False  # what foreign code asks of the host in a step, nobody knows

    def __init__(
        self,
        config: ModelConfig,
        module: Any,
        anatomy: Anatomy,
        kernels: Kernels,
        *,
        dtype: torch.dtype,
        device: str,
    ) -> None:
        self.config = replace(
            config,
            num_heads=anatomy.num_heads,
            num_kv_heads=anatomy.num_kv_heads,
            head_dim=anatomy.head_dim,
        )
        self.kernels = kernels
        self.dtype = dtype
        self.device = device
        self.scratch_bytes = 0  # nothing stays quantised
        self.crowded_by = anatomy.crowded_by
        if self.crowded_by is None and torch.device(device).type != "cpu":
            self.crowded_by = "what transformers computes between products on a GPU"
        self._module = module
        self._trunk = module.get_submodule(anatomy.trunk)
        self._layer_of = {module.get_submodule(name): i for i, name in enumerate(anatomy.attentions)}

    @classmethod
    def load(cls, checkpoint: Checkpoint, kernels: Kernels, *, dtype: torch.dtype, device: str) -> Fallback:
        """Refuse what cannot be run, then read the weights.

        Raises `UnsupportedCheckpoint` naming the reason, or a tensor that is missing or not known.
        """
        with quiet():
            anatomy = dissect(checkpoint.config, configuration(checkpoint))
            module = loaded_module(checkpoint, dtype).to(device)
        return cls(checkpoint.config, module, anatomy, kernels, dtype=dtype, device=device)

    def prepare(self, max_len: int) -> None:
        """Make the bits of a row its own, then compare a few tokens with transformers' own attention.

        Raises `UnsupportedCheckpoint` when they differ.
        """
        if torch.device(self.device).type == "cpu":
            for name, module in list(self._module.named_modules(remove_duplicate=False)):
                if is_activation(module):
                    self._module.set_submodule(name, Elementwise(module))
        rehearse(
            self.config,
            self.forward,
            self._own_logits,
            max_len=max_len,
            dtype=self.dtype,
            device=self.device,
            keys_by_token=self.kernels.keys_by_token,
        )

    def distinct_products(self) -> list[Product]:
        """One product of each shape that occurs, with and without bias: what a check of products must look at."""
        products: dict[tuple[object, ...], Product] = {}
        for module in self._module.modules():
            if is_product(module):
                key = (type(module), module.weight.shape, module.bias is None)
                products.setdefault(key, Product(module))
        return list(products.values())

    def invariant_products(self) -> bool:
        """Products here are transformers' affair, as it finds them in its library."""
        return False

    def pad_groups(self, row_multiple: int) -> None:
        """For experts; how their rows are grouped here is transformers' affair (`crowded_by`)."""

    def forward(self, step: StepInput, cache: KVCache) -> Tensor:
        """Run all tokens of the step and store their K and V. Logits `[S, vocab]` of `step.logit_rows`."""
        return self.logits(self.hidden(step, cache), step.logit_rows)

    def hidden(self, step: StepInput, cache: KVCache) -> Any:
        """As `forward`, but what the trunk makes of all tokens of the step, in transformers' wrapping."""

        def attention(call: Call) -> Tensor:
            pages = cache.layers[self._layer_of[call.module]]
            q, k, v = _rows(call.q), _rows(call.k), _rows(call.v)
            self.kernels.store_kv(k, v, pages, step.slots)
            sinks = None if call.sinks is None else call.sinks.float().contiguous()
            how = Attention(call.scale, window=call.window, softcap=call.softcap, sinks=sinks)
            mixed = self.kernels.paged_attention(
                q, pages, step.page_table, step.query_start, step.context_lens, how, step.shared
            )
            return mixed[None]

        with plugged(attention):
            return self._trunk(
                input_ids=step.token_ids[None],
                position_ids=step.positions[None],
                attention_mask=None,
                use_cache=False,
            )

    def logits(self, hidden: Any, rows: Tensor | None) -> Tensor:
        """`[N, vocab]` of the tokens `rows` `[N]` of a step. Only they reach the head. None: of all.

        A head may be more than one product, so the whole model runs, with a trunk that has its answer already.
        """
        if rows is None:
            rows = torch.arange(hidden[0].shape[1], device=self.device)
        self._trunk.forward = lambda *_inputs, **_options: hidden
        try:
            output = self._module(input_ids=rows[None], use_cache=False, logits_to_keep=rows)
        finally:
            del self._trunk.forward  # the class has the real one
        logits: Tensor = output.logits[0]
        return logits

    def _own_logits(self, tokens: Tensor) -> Tensor:
        """tokens `[n]` → logits `[n, vocab]`, with transformers' attention, masks and positions."""
        with quiet():
            self._module.set_attn_implementation("eager")
            try:
                logits: Tensor = self._module(input_ids=tokens[None], use_cache=False).logits[0]
            finally:
                self._module.set_attn_implementation(plain_name())
        return logits


def _rows(x: Tensor) -> Tensor:
    """`[1, heads, T, d]` → `[T, heads, d]` in one piece."""
    _, heads, num_tokens, dim = x.shape
    return x[0].transpose(0, 1).reshape(num_tokens, heads * dim).view(num_tokens, heads, dim)
