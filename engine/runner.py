"""ModelRunner: one loaded model on one device, which turns a `Plan` into tokens.

Owns the decoder, the KV memory and the sampler. Whether a token depends on its crowd is found out at load
(`determinism`). Knows nothing of waiting, finishing or text: the scheduler appends the tokens and moves the counters.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine.cache import KVCache
from engine.checkpoint import Checkpoint
from engine.config import EngineConfig
from engine.decode_steps import DecodeSteps
from engine.determinism import resolve_deterministic
from engine.kept_weights import kept_formats
from engine.logprobs import score_prompts, slice_rows
from engine.memory import (
    PAGE_SIZES,
    bytes_per_page,
    fitting_host_pages,
    fitting_pages,
    token_budget,
    usable_pages,
)
from engine.model import Decoder
from engine.model_config import ModelConfig
from engine.multi_step import decodes_freely
from engine.placement import weight_targets
from engine.plan import Draws, Launched, Move, OutOfDeviceMemory, Plan, PromptScores
from engine.resolved_settings import (
    refuse_quantization,
    resolve_device,
    resolve_dtype,
    resolve_kv_cache_dtype,
    resolve_max_model_len,
)
from engine.sampler import Sampler
from engine.sampling_params import InvalidParameter
from engine.shortage import is_shortage
from engine.speculation import STEP_TOKENS, num_speculative_tokens
from engine.step_input import StepInput
from engine.step_times import StepTimes
from engine.weight_source import open_source
from engine.weights import load_weights
from kernels import Kernels, kernels_for

if TYPE_CHECKING:
    from engine.fallback import Fallback


STEPS_TOGETHER = {"cpu": 1, "cuda": 16}  # unless the settings say otherwise


class ModelRunner:
    """Made by `load`. Attributes are read-only."""

    def __init__(
        self,
        decoder: Decoder | Fallback,
        cache: KVCache,
        *,
        page_size: int,
        max_model_len: int,
        max_num_batched_tokens: int,
        row_multiple: int,
        deterministic: bool,
        steps: DecodeSteps,
        num_scheduler_steps: int,
        num_speculative_tokens: int = 0,
        seconds_per_page_moved: float | None = None,
    ) -> None:
        self.model_config: ModelConfig = decoder.config
        self.cache = cache
        self._moves: list[Move] = []  # of plans that were launched; not yet made
        self.num_pages = cache.num_pages
        self.num_host_pages = cache.num_host_pages
        self.seconds_per_page_moved = seconds_per_page_moved  # out and back in; None without host pages
        self.kv_cache_dtype = cache.dtype
        self.page_size = page_size
        self.max_model_len = max_model_len
        self.max_num_batched_tokens = max_num_batched_tokens
        self.device = decoder.device
        self.dtype = str(decoder.dtype).removeprefix("torch.")
        self.kernels_name = decoder.kernels.name
        self.deterministic = deterministic
        self.num_scheduler_steps = num_scheduler_steps
        self.times = StepTimes()  # of the steps of whoever launches
        self.num_speculative_tokens = num_speculative_tokens
        self._row_multiple = row_multiple
        self._steps = steps
        self._decoder = decoder
        sharing = decoder.kernels.sharing  # told in steps of all kinds of rows: others would not use it there
        self._sharing = sharing if sharing is not None and sharing.exact else None
        self._sampler = Sampler(decoder.config, decoder.kernels)

    @classmethod
    def load(cls, config: EngineConfig, checkpoint: Checkpoint, *, bar: bool = False) -> ModelRunner:
        """Read the weights, allocate the pages, check determinism. `bar`: show how far it is, at a terminal.

        Raises `InvalidParameter` for a setting that cannot work here, `UnsupportedCheckpoint` for weights.
        """
        model = checkpoint.config
        device = resolve_device(config.device)
        dtype = resolve_dtype(config.dtype, model, device)
        resolve_max_model_len(config, model)  # what cannot be is said before any weight is read
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        try:
            kernels = kernels_for(device, config.kernels, dtype=dtype)
        except ValueError as error:
            raise InvalidParameter("kernels", str(error)) from None
        resolve_kv_cache_dtype(config.kv_cache_dtype, dtype, kernels)
        refuse_quantization(config.quantization, model, kernels)
        with torch.inference_mode():
            decoder = load_decoder(
                checkpoint, kernels, dtype=dtype, device=device, int8=config.quantization == "int8", bar=bar
            )
        return cls.over(decoder, config)

    @classmethod
    def over(cls, decoder: Decoder | Fallback, config: EngineConfig) -> ModelRunner:
        """Around a decoder that has its weights and is not yet prepared: allocate the pages, check determinism.

        Raises `InvalidParameter` for a setting that cannot work here.
        """
        max_model_len = resolve_max_model_len(config, decoder.config)
        kind = torch.device(decoder.device).type
        page_size = config.page_size or PAGE_SIZES[kind]
        max_num_batched_tokens = config.max_num_batched_tokens or token_budget(decoder.device)
        storage = resolve_kv_cache_dtype(config.kv_cache_dtype, decoder.dtype, decoder.kernels)
        with torch.inference_mode():
            decoder.prepare(max_model_len)
            cache = allocate_cache(
                config,
                decoder,
                storage=storage,
                page_size=page_size,
                max_model_len=max_model_len,
                max_num_batched_tokens=max_num_batched_tokens,
            )
            row_multiple, deterministic = resolve_deterministic(config.deterministic, decoder)
            decoder.pad_groups(row_multiple)
        together = 1 if config.num_speculative_tokens else STEPS_TOGETHER[kind]
        num_scheduler_steps = config.num_scheduler_steps or together
        sharing = decoder.kernels.sharing  # must keep every bit where tokens may not depend on the crowd
        steps = DecodeSteps(
            decoder,
            cache,
            page_size=page_size,
            most_rows=config.max_num_seqs,
            most_pages=-(-max_model_len // page_size),
            most_steps=num_scheduler_steps,
            row_multiple=row_multiple,
            sharing=None if deterministic and not (sharing and sharing.exact) else sharing,
        )
        steps.capture()
        return cls(
            decoder,
            cache,
            page_size=page_size,
            max_model_len=max_model_len,
            max_num_batched_tokens=max_num_batched_tokens,
            row_multiple=row_multiple,
            deterministic=deterministic,
            steps=steps,
            num_scheduler_steps=num_scheduler_steps,
            num_speculative_tokens=num_speculative_tokens(
                config,
                num_scheduler_steps=num_scheduler_steps,
                cheap=kind == "cpu" and (row_multiple >= STEP_TOKENS or decoder.own_products),
            ),
            seconds_per_page_moved=cache.seconds_per_page_moved(),
        )

    def launch(self, plan: Plan) -> Launched:
        """Start a plan. One of several steps runs on when this returns, if the device is a GPU.

        Raises `OutOfDeviceMemory` where a plan of fewer tokens may do.
        """
        self.times.begin("inputs")
        with torch.inference_mode():
            self._moves += plan.moves
            try:
                self.cache.move(self._moves)
                return self._launched(plan)
            except RuntimeError as error:
                if not is_shortage(error):
                    raise
                reason = str(error).split("\n")[0]
            torch.cuda.empty_cache()  # here, where the tensors of the plan are gone
            raise OutOfDeviceMemory(reason)

    def _launched(self, plan: Plan) -> Launched:
        if plan.num_steps > 1:
            return self._decode_freely(plan)
        draws = self._decode(plan) if self._steps.captures and _decodes(plan) else self._compute(plan)
        return lambda: draws

    def run(self, plan: Plan) -> Draws:
        """Compute every row of the plan. One token id per entry of `plan.sampling_rows`, in that order; -1
        where that row's logits were not finite, which harms no other row. Logprobs for rows that ask."""
        return self.launch(plan)()

    def _compute(self, plan: Plan) -> Draws:
        """Of a plan of one step. A plan without rows is no work."""
        if not plan.rows:
            return Draws([], {})
        sampling_rows = plan.sampling_rows
        step = self._input(plan)
        self.times.begin("forward")
        hidden = self._decoder.hidden(step, self.cache)
        scores: dict[int, PromptScores] = {}
        if step.scored_rows.shape[0]:
            at_once = slice_rows(self.model_config.vocab_size, self._row_multiple)
            logits_of = partial(self._decoder.logits, hidden)
            normalisers = self._decoder.kernels.normalisers
            scores = score_prompts(plan, step.scored_rows, logits_of, at_once, normalisers)
        if not sampling_rows:
            return Draws([], {}, scores)
        logits = self._decoder.logits(hidden, step.logit_rows)
        self.times.begin("sample")
        draws = self._sampler(logits[: plan.num_draws], sampling_rows)
        return draws.with_scores(plan, scores) if scores else draws

    def _input(self, plan: Plan) -> StepInput:
        return StepInput.build(
            plan,
            self.page_size,
            row_multiple=self._row_multiple,
            device=self.device,
            sharing=self._sharing,
        )

    def _decode(self, plan: Plan) -> Draws:
        """Of a plan of one step whose rows all compute their last token."""
        if all(decodes_freely(row.sequence) for row in plan.rows):
            return self._decode_freely(plan)()
        self.times.begin("forward")
        logits = self._steps.logits(plan.rows)
        self.times.begin("sample")
        return self._sampler(logits, list(plan.rows))

    def _decode_freely(self, plan: Plan) -> Launched:
        self.times.begin("forward")
        drawn = self._steps.launch(plan.rows, plan.num_steps, behind=plan.behind)

        return lambda: Draws.of_steps(plan.rows, drawn.tokens(), drawn.logprobs())

    def logits(self, plan: Plan) -> Tensor:
        """As `run`, but the logits `[draws, vocab]` before any sampling."""
        with torch.inference_mode():
            self.cache.move(list(plan.moves))
            step = self._input(plan)
            return self._decoder.forward(step, self.cache)[: plan.num_draws]


def _decodes(plan: Plan) -> bool:
    return all(row.num_queries == 1 and row.samples and not row.scored for row in plan.rows)


def load_decoder(
    checkpoint: Checkpoint,
    kernels: Kernels,
    *,
    dtype: torch.dtype,
    device: str,
    int8: bool = False,
    bar: bool = False,
) -> Decoder | Fallback:
    """With its weights, not yet prepared. Raises `UnsupportedCheckpoint`."""
    if checkpoint.config.definition == "transformers":
        from engine.fallback import Fallback

        return Fallback.load(checkpoint, kernels, dtype=dtype, device=device)
    config = checkpoint.config
    source = open_source(checkpoint, weight_targets(config))
    kept = kept_formats(source, config, kernels.keeps)
    decoder = Decoder(config, kernels, dtype=dtype, device=device, kept=kept, int8=int8)
    load_weights(decoder, checkpoint, source=source, bar=bar)
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()  # what repacking and changes of layout took is free, and is to be counted so
    return decoder


def allocate_cache(
    config: EngineConfig,
    decoder: Decoder | Fallback,
    *,
    storage: torch.dtype,
    page_size: int,
    max_model_len: int,
    max_num_batched_tokens: int,
) -> KVCache:
    """Pages on the device and on the host, as many as the settings and the memory allow."""
    num_pages = fitting_pages(
        decoder.config,
        page_size=page_size,
        storage=storage,
        device=decoder.device,
        max_num_seqs=config.max_num_seqs,
        max_model_len=max_model_len,
        max_num_batched_tokens=max_num_batched_tokens,
        scratch_bytes=decoder.scratch_bytes,
        memory_bytes=config.kv_cache_memory_bytes,
    )
    num_host_pages = fitting_host_pages(
        bytes_per_page(decoder.config, page_size, storage),
        usable=usable_pages(page_size, max_num_seqs=config.max_num_seqs, max_model_len=max_model_len),
        mode=config.preemption_mode,
        device=decoder.device,
        swap_space_bytes=config.swap_space_bytes,
    )
    return KVCache.allocate(
        decoder.config,
        num_pages,
        page_size,
        dtype=decoder.dtype,
        device=decoder.device,
        storage=storage,
        num_host_pages=num_host_pages,
        keys_by_token=decoder.kernels.keys_by_token,
    )
