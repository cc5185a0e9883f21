"""The likeliest tokens of rows of logits, in one order.

Owns that order, in torch: by logit, equals by the lower id. Knows nothing of who asks: logprobs do.
"""

from __future__ import annotations

import torch
from torch import Tensor


def ranked(logits: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The `width` largest logits of each row, descending, and their token ids; ties by the lower id.

    Sorted by one int64 key per token, unique in its row: the logit's bits made monotone, then the inverted
    id. `topk` on the logits alone would break ties differently for different row counts.
    """
    bits = logits.view(torch.int32)
    keys = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long() << 32
    keys += torch.arange(logits.shape[1] - 1, -1, -1, device=logits.device)
    order = keys.topk(width, dim=1, sorted=True).indices
    return logits.gather(1, order), order
