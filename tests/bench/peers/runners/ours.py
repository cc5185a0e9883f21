"""Ours: this project's engine, through its Python door, on a workload file. Runs in this project's environment."""

from __future__ import annotations

import os

from child import Loaded, Order, main

from engine.llm import LLM
from engine.resolved_settings import resolve_dtype
from engine.sampling_params import SamplingParams


def load(order: Order) -> Loaded:
    guessed = os.environ.get("NUM_SPECULATIVE_TOKENS")
    llm = LLM(
        model=order.model,
        device="cpu",
        dtype=order.dtype,
        num_speculative_tokens=None if guessed is None else int(guessed),
        use_tqdm=False,
    )
    model = llm.engine.runner.model_config
    taken, default = (
        str(resolve_dtype(dtype, model, "cpu")).removeprefix("torch.") for dtype in (order.dtype, "auto")
    )

    def generate(prompts: list[list[int]], new_tokens: list[int]) -> list[int]:
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            [SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True) for count in new_tokens],
            use_tqdm=False,
        )
        return [len(output.outputs[0].token_ids) for output in outputs]

    notes = [f"dtype=auto would take {default} here"]
    return Loaded(
        generate, taken, notes if guessed is None else [*notes, f"num_speculative_tokens={guessed}"]
    )


if __name__ == "__main__":
    main(load, ("nightpress", "torch"))
