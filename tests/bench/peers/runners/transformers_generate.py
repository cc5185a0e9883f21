"""transformers `generate` on a workload file: batches of 32, left padded, in the order of the file.

A batch runs until its longest request is done. What it generates for the others meanwhile is not output.
"""

from __future__ import annotations

import torch
from child import Loaded, Order, main
from transformers import AutoModelForCausalLM

BATCH = 32


def load(order: Order) -> Loaded:
    dtype = getattr(torch, order.dtype)
    model = AutoModelForCausalLM.from_pretrained(order.model, dtype=dtype).eval()

    def batch(prompts: list[list[int]], new_tokens: list[int]) -> None:
        width, longest = max(map(len, prompts)), max(new_tokens)
        padding = [width - len(prompt) for prompt in prompts]
        out = model.generate(
            torch.tensor([[0] * pad + prompt for pad, prompt in zip(padding, prompts, strict=True)]),
            attention_mask=torch.tensor([[0] * pad + [1] * (width - pad) for pad in padding]),
            do_sample=False,
            max_new_tokens=longest,
            min_new_tokens=longest,
            eos_token_id=None,
            pad_token_id=0,
        )
        if out.shape[1] != width + longest:
            raise SystemExit(f"a batch stopped after {out.shape[1] - width} of {longest} tokens")

    def generate(prompts: list[list[int]], new_tokens: list[int]) -> list[int]:
        for start in range(0, len(prompts), BATCH):
            batch(prompts[start : start + BATCH], new_tokens[start : start + BATCH])
        return new_tokens

    return Loaded(generate, order.dtype)


if __name__ == "__main__":
    main(load, ("transformers", "torch"))
