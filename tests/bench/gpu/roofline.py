"""Roofline: the least time that steps can take, from what they must move and compute (Williams et al. 2009).

Owns the counting of bytes and operations of a decoder's step. Knows ceilings as two numbers, and no engine. It is a
bound for each step by itself: the larger of its two times; what a step cannot avoid, and nothing else, is counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from engine.model_config import ModelConfig
from engine.parameters import parameter_shapes


class Row(NamedTuple):
    """One sequence in a step: so many tokens are computed behind so many that were."""

    num_tokens: int
    num_computed: int
    samples: bool  # whether the next token is drawn

    @property
    def context(self) -> int:
        """Tokens that are attended to, those of this step included."""
        return self.num_tokens + self.num_computed

    @property
    def pairs(self) -> int:
        """Of a query and a key that it sees."""
        return self.num_tokens * self.num_computed + self.num_tokens * (self.num_tokens + 1) // 2


class Cost(NamedTuple):
    num_bytes: int
    num_flops: int


@dataclass(frozen=True, slots=True)
class Roofline:
    """Of a model in `itemsize` bytes per number, weights and cache alike, on a device that moves `copy_rate` bytes
    and computes `product_rate` operations per second. `layer_bytes`: of all weights but the embedding and the head,
    where they are quantised. Raises `ValueError` for models whose steps do not say what they
    read: experts and windows."""

    config: ModelConfig
    copy_rate: float
    product_rate: float
    itemsize: int = 2
    layer_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.config.moe is not None or any(window is not None for window in self.config.windows):
            raise ValueError("experts and windows are not counted here")

    def cost(self, rows: Iterable[Row]) -> Cost:
        """Bytes: every weight once, but of the embedding only the tokens' rows, and the head only if a row draws;
        K and V of each row's context, read once; K and V of the step's tokens, written. Operations: two for each
        weight of a product and token, and for each channel of a query and a key that meet, twice (K and V)."""
        config, listed = self.config, list(rows)
        tokens = sum(row.num_tokens for row in listed)
        draws = sum(row.samples for row in listed)
        context = sum(row.context for row in listed)
        pairs = sum(row.pairs for row in listed)
        head = config.vocab_size * config.hidden_size
        weights, products = _sizes(config)
        gathered = tokens * config.hidden_size * (2 if config.positions == "learned" else 1)
        num_bytes = self.itemsize * (gathered + (head if draws else 0))
        num_bytes += self.itemsize * weights if self.layer_bytes is None else self.layer_bytes
        num_bytes += config.kv_bytes_per_token(self.itemsize) * (context + tokens)
        num_flops = 2 * products * tokens + 2 * head * draws
        num_flops += 4 * config.num_layers * config.num_heads * config.head_dim * pairs
        return Cost(num_bytes, num_flops)

    def seconds(self, steps: Iterable[Iterable[Row]]) -> float:
        """The least that these steps take, one after another."""
        total = 0.0
        for rows in steps:
            num_bytes, num_flops = self.cost(rows)
            total += max(num_bytes / self.copy_rate, num_flops / self.product_rate)
        return total


@cache
def _sizes(config: ModelConfig) -> tuple[int, int]:
    """Numbers in all weights but the embedding and the head, and in those of them that are products."""
    sizes = [
        (math.prod(shape), len(shape) == 2)
        for name, shape in parameter_shapes(config).items()
        if not name.startswith(("model.embed_", "lm_head."))
    ]
    return sum(size for size, _ in sizes), sum(size for size, is_product in sizes if is_product)


def ideal_steps(
    prompts: list[int], new_tokens: list[int], chunk: int, shared: int = 0
) -> Iterator[list[Row]]:
    """Of a device that holds all requests at once: their prompts in steps of `chunk` tokens, then one token of every
    request that wants more, until none does. `prompts`: lengths, the first `shared` tokens of all being the same and
    computed once."""
    rows: list[Row] = []
    room = chunk
    for k, length in enumerate(prompts):
        computed = shared if k else 0
        while computed < length:
            count = min(room, length - computed)
            rows.append(Row(count, computed, computed + count == length))
            computed, room = computed + count, room - count
            if not room:
                yield rows
                rows, room = [], chunk
    if rows:
        yield rows
    for step in range(1, max(new_tokens, default=0)):
        # its last token is drawn, but never computed
        yield [Row(1, p + step - 1, True) for p, n in zip(prompts, new_tokens, strict=True) if n > step]
