"""Rehearsal: a fallback's first tokens, against the same model with transformers' own attention.

Owns the comparison that catches what cannot be seen from outside: positions counted in a way of the model's own, or
neighbours of a step that leak into each other past attention. Knows no architectures. It costs a few small forward
passes at load.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from engine.cache import KVCache
from engine.model_config import ModelConfig, UnsupportedCheckpoint
from engine.plan import Plan, Row
from engine.request import Request, RequestId
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from engine.step_input import StepInput

_PAGE_SIZE = 16
_LENGTHS = (15, 11, 6)
_CHUNK = 4  # tokens of a sequence per step: most rows then have a stranger near them
_TOLERANCE = {torch.float32: 1e-3}
_TOLERANCE_16_BITS = 0.1


def rehearse(
    config: ModelConfig,
    forward: Callable[[StepInput, KVCache], Tensor],
    own_logits: Callable[[Tensor], Tensor],
    *,
    max_len: int,
    dtype: torch.dtype,
    device: str,
    keys_by_token: bool,
) -> None:
    """`forward` runs steps through pages, in which K lies as `keys_by_token` says; `own_logits`: tokens `[n]` →
    logits `[n, vocab]` without any of ours.

    Raises `UnsupportedCheckpoint` where they differ by more than rounding: a mean of the rows' relative distances,
    since with 16 bits a single row may differ much, where experts are chosen.
    """
    generator = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(config.vocab_size, (min(length, max_len),), generator=generator) for length in _LENGTHS
    ]
    cache = KVCache.allocate(
        config, len(prompts), _PAGE_SIZE, dtype=dtype, device=device, keys_by_token=keys_by_token
    )
    found = _in_steps(forward, cache, prompts, device)
    distances = []
    for prompt, logits in zip(prompts, found, strict=True):
        own = own_logits(prompt.to(device)).float()
        centred = own - own.mean(dim=-1, keepdim=True)
        distances.append((logits.float() - own).norm(dim=-1) / centred.norm(dim=-1))
    distance = torch.cat(distances).mean().item()
    if not distance <= _TOLERANCE.get(dtype, _TOLERANCE_16_BITS):  # NaN is no agreement either
        raise UnsupportedCheckpoint(
            f"{config.architecture}: with paged attention its logits are not those of transformers "
            f"(relative distance {distance:.2g}): it looks at other tokens or positions in a way of its own"
        )


def _in_steps(
    forward: Callable[[StepInput, KVCache], Tensor], cache: KVCache, prompts: list[Tensor], device: str
) -> list[Tensor]:
    """Logits `[n, vocab]` of each prompt, computed together, a few tokens of each at a time."""
    sequences = []
    for number, prompt in enumerate(prompts):
        request = Request(
            id=RequestId(f"rehearsal {number}", 0),
            prompt_token_ids=tuple(prompt.tolist()),
            sampling=SamplingParams(seed=0),
        )
        sequences.append(Sequence(request, 0, max_tokens=1))
        sequences[-1].pages = [number]
    found: list[list[Tensor]] = [[] for _ in prompts]
    while any(sequence.num_pending for sequence in sequences):
        rows = tuple(
            Row(sequence, min(_CHUNK, sequence.num_pending)) for sequence in sequences if sequence.num_pending
        )
        step = StepInput.build(Plan(rows), _PAGE_SIZE, device=device)
        everywhere = torch.arange(step.token_ids.shape[0], device=device)
        logits = forward(replace(step, logit_rows=everywhere, read=None), cache)
        for row, part in zip(rows, torch.split(logits, [row.num_tokens for row in rows]), strict=True):
            found[sequences.index(row.sequence)].append(part)
            row.sequence.num_computed += row.num_tokens
    return [torch.cat(parts) for parts in found]
