"""What transformers makes of a prompt: the peer that parity is measured against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def continued(model: Any, prompt: Sequence[int], max_tokens: int) -> Tensor:
    """Prompt and greedy continuation `[1, at most len(prompt) + max_tokens]`, by transformers' `generate`."""
    with torch.inference_mode():
        whole: Tensor = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=max_tokens,
            pad_token_id=0,
        )
    return whole
