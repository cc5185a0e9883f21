"""Plug: the one place where our attention is put into transformers' modules.

Owns the names registered with transformers' attention interface, and who answers a call: whatever `plugged` holds
for the running context, so that two models in one process never meet. Knows neither pages nor models.
transformers is imported on first use only: it takes seconds, and most models never need it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn

# Passed on by some models and without meaning for us: positions are in q and k already, there is no other cache
IGNORED = frozenset(
    {"position_ids", "cache_position", "use_cache", "dropout", "return_dict", "logits_to_keep"}
    | {"output_attentions", "output_hidden_states"}
)
_WITNESS_ROWS = 2


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """What a module hands over: q `[1, heads, T, d]`, k and v `[1, kv heads, T, d]`, rotated where they rotate."""

    module: nn.Module
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    scale: float
    window: int | None  # a query sees itself and the window − 1 tokens before it
    softcap: float | None
    sinks: Tensor | None  # per head, the score of a key without a value; of any shape and dtype
    others: dict[str, Any]  # arguments that would change the result, and that nobody here understands


class Answer(Protocol):
    """What a call gets: `[1, T, heads, d]`."""

    def __call__(self, call: Call) -> Tensor: ...


_answer: ContextVar[Answer] = ContextVar("answer")


@contextmanager
def plugged(answer: Answer) -> Iterator[None]:
    """Within it, every call of a module that was built with one of the names below goes to `answer`."""
    token = _answer.set(answer)
    try:
        yield
    finally:
        _answer.reset(token)


@cache
def plain_name() -> str:
    """The name to build a model with: it makes no masks."""
    return _registered("nightpress", None)


@cache
def witness_name(length: int) -> str:
    """The name that makes the model show its masks: `call.mask` then is bool `[1, 1, 2, length]`, True where the
    query in the middle and the last of `length` positions see a key."""

    def witness(*, mask_function: Callable[..., Tensor], **_: Any) -> Tensor:
        first = torch.zeros((), dtype=torch.int64)  # of the batch and of the heads
        queries, keys = witness_rows(length)[:, None], torch.arange(length)[None, :]
        return mask_function(first, first, queries, keys).expand(1, 1, _WITNESS_ROWS, length)

    return _registered(f"nightpress_witness_{length}", witness)


def witness_rows(length: int) -> Tensor:
    """Positions of the queries that bear witness `[2]`."""
    return torch.tensor([length // 2, length - 1])


def _registered(name: str, mask: Callable[..., Tensor] | None) -> str:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, _attend)
    if mask is not None:  # transformers makes no mask for a name without one
        AttentionMaskInterface.register(name, mask)
    return name


def _attend(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    # what is switched off changes nothing
    asked = {name: value for name, value in others.items() if value is not None and value is not False}
    if is_causal is False:
        asked["attention in both directions"] = True
    call = Call(
        module=module,
        q=q,
        k=k,
        v=v,
        mask=attention_mask,
        scale=q.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
        others={name: value for name, value in asked.items() if name not in IGNORED},
    )
    return _answer.get()(call), None
