"""LLM: the engine as a Python object, for scripts and notebooks. Names follow vLLM's class of the same name.

Owns text in, text out and the order of the results. Runs its engine in this process, so a device error is the
caller's exception; the service uses `process` instead. Knows no queue outside its own call.

A prompt that cannot run does not spoil the others: its output carries `error` and one sample with
`finish_reason="error"`. What is wrong with the call itself (types, parameters) raises before any work.
"""

from __future__ import annotations

import itertools
import logging
import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from engine.chat_template import Message
from engine.config import EngineConfig
from engine.engine import Engine
from engine.reasoning import told
from engine.request import (
    Completion,
    Output,
    Rejected,
    Request,
    RequestError,
    RequestId,
    TokenLogprobs,
    derive_seed,
)
from engine.sampling_params import SamplingParams
from engine.template_variables import TemplateVariables, check_variables

log = logging.getLogger(__name__)

MAX_QUEUED = 100_000  # prompts of one `generate` that the engine sees at once

Prompt = str | Mapping[str, Sequence[int]]  # text, or {"prompt_token_ids": [...]}


class _Chat(dict[str, Sequence[int]]):
    """A prompt that a chat template wrote."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOutput:
    """One sample. `text` ends before a stop string; `token_ids` are everything that was generated. `reasoning`: what
    the model thought before its answer to a chat, where that can be told apart (`EngineConfig.reasoning_parser`).

    With `SamplingParams.logprobs`, `logprobs` has one entry per token of `token_ids` and `cumulative_logprob`
    is the sum over the chosen ones.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length", "repetition", "error"]
    stop_reason: str | int | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None
    cumulative_logprob: float | None = None
    reasoning: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """The answer to one prompt. `prompt` is None when token ids came in; `error` says why nothing came out. With
    `SamplingParams.prompt_logprobs`, `prompt_logprobs` has one entry per prompt token, None for the first."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    num_cached_tokens: int = 0
    error: RequestError | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None


class LLM:
    """`model` is a folder, a GGUF file or a hub id; the other settings are those of `EngineConfig`. `use_tqdm`: a
    bar while the weights are read, if stderr is a terminal.

    Raises what `Engine.load` raises. Not for several threads at once.
    """

    def __init__(self, model: str, *, use_tqdm: bool = True, **settings: Any) -> None:
        self.config = EngineConfig(model=str(model), **settings)
        self.engine = Engine.load(self.config, bar=use_tqdm)
        tokenizer = self.engine.tokenizer
        assert tokenizer is not None  # `load` makes one
        self.tokenizer = tokenizer
        self._count = itertools.count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """One output per prompt, in their order. One `SamplingParams` for all, or one for each."""
        prompts = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
        for i, prompt in enumerate(prompts):
            if not isinstance(prompt, str) and not (
                isinstance(prompt, Mapping) and "prompt_token_ids" in prompt
            ):
                raise TypeError(f"prompts[{i}]: must be a string or {{'prompt_token_ids': [...]}}")
        return self._ordered(prompts, _per_prompt(sampling_params, len(prompts)), use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        chat_template_kwargs: TemplateVariables | None = None,
    ) -> list[RequestOutput]:
        """As `generate`, for one conversation or a list of them, through the checkpoint's chat template.

        `chat_template_kwargs`: variables of the template, for all of them, such as `{"enable_thinking": False}`;
        those that it does not read change nothing. Raises `InvalidParameter`."""
        check_variables(chat_template_kwargs or {})
        one = bool(messages) and isinstance(messages[0], Mapping)
        chats: list[Any] = [messages] if one else list(messages)
        prompts = [self._chat_prompt(chat, chat_template_kwargs) for chat in chats]
        return self._ordered(prompts, _per_prompt(sampling_params, len(prompts)), use_tqdm)

    def stream(
        self,
        prompts: Iterable[tuple[Prompt | RequestError, SamplingParams]],
        *,
        max_queued: int | None = None,
    ) -> Iterator[tuple[int, RequestOutput]]:
        """(number of the prompt, its output) as they finish. Prompts are taken only as fast as they are needed.

        `max_queued`: how many may be in the engine; None: twice `max_num_seqs`. The more it sees, the better it
        plans. They are taken in between the steps, a few at a time, so the first answers do not wait for the
        last prompt. Leaving the iterator early aborts what is in it.
        """
        group = 2 * self.config.max_num_seqs
        source = enumerate(prompts)
        live: dict[RequestId, tuple[int, str | None, Request]] = {}
        exhausted = False
        try:
            while True:
                room = min(group, (max_queued or group) - len(live))
                while not exhausted and room > 0:
                    room -= 1
                    entry = next(source, None)
                    if entry is None:
                        exhausted = True
                        break
                    index, (prompt, sampling) = entry
                    request_id = RequestId(str(next(self._count)), 0)
                    text = prompt if isinstance(prompt, str) else None
                    try:
                        request = self._request(request_id, prompt, sampling)
                        self.engine.add(request)
                    except Rejected as rejected:
                        error = RequestError(code=rejected.code, message=rejected.message)
                        yield index, _failed(request_id, text, error)
                    else:
                        live[request_id] = index, text, request
                if not live:
                    return
                for completion in self.engine.step():
                    index, text, request = live.pop(completion.id)
                    yield index, self._output(completion, text, request)
        finally:
            for request_id in live:
                self.engine.abort(request_id)

    def _ordered(
        self, prompts: Sequence[Prompt | RequestError], sampling: Sequence[SamplingParams], use_tqdm: bool
    ) -> list[RequestOutput]:
        finished: dict[int, RequestOutput] = {}
        with _ProgressBar(len(prompts), use_tqdm) as bar:
            asked = zip(prompts, sampling, strict=True)
            for index, output in self.stream(asked, max_queued=MAX_QUEUED):
                finished[index] = output
                bar.took(output)
        failed = [index for index, output in sorted(finished.items()) if output.error]
        for index in failed:
            log.warning("prompt %d was not generated: %s", index, finished[index].error)
        return [finished[index] for index in range(len(prompts))]

    def _chat_prompt(
        self, chat: Sequence[Message], variables: TemplateVariables | None
    ) -> Prompt | RequestError:
        try:
            return _Chat(prompt_token_ids=self.tokenizer.encode_chat(chat, variables=variables))
        except ValueError as error:  # of the template, or text that is not Unicode
            return RequestError(code="invalid_request", message=str(error))

    def _request(
        self, request_id: RequestId, prompt: Prompt | RequestError, sampling: SamplingParams
    ) -> Request:
        if isinstance(prompt, RequestError):
            raise Rejected(prompt.code, prompt.message)
        try:
            given = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt["prompt_token_ids"]
            token_ids = tuple(map(operator.index, given))
        except ValueError as error:
            raise Rejected("invalid_request", f"prompt: {error}") from None
        except TypeError:
            raise Rejected("invalid_request", "prompt_token_ids: must be a list of integers") from None
        if sampling.seed is None:
            sampling = replace(sampling, seed=derive_seed(self.config.seed, request_id.job_id))
        form = self.engine.reasoning if isinstance(prompt, _Chat) else None
        begins = form.begins(token_ids) if form else "answer"
        return Request(id=request_id, prompt_token_ids=token_ids, sampling=sampling, begins=begins)

    def _output(self, completion: Completion, text: str | None, request: Request) -> RequestOutput:
        if completion.error is not None:
            return _failed(completion.id, text, completion.error, request.prompt_token_ids)
        return RequestOutput(
            request_id=completion.id.job_id,
            prompt=text,
            prompt_token_ids=request.prompt_token_ids,
            outputs=tuple(self._sample(index, output) for index, output in enumerate(completion.outputs)),
            num_cached_tokens=completion.num_cached_tokens,
            prompt_logprobs=completion.prompt_logprobs,
        )

    def _sample(self, index: int, output: Output) -> CompletionOutput:
        said = told(output, self.tokenizer, self.engine.reasoning)
        return CompletionOutput(
            index=index,
            text=said.text,
            token_ids=output.token_ids,
            finish_reason=output.finish_reason,
            stop_reason=output.stop_reason,
            logprobs=output.logprobs,
            cumulative_logprob=_cumulative(output.logprobs),
            reasoning=said.reasoning,
        )


def _cumulative(logprobs: Sequence[TokenLogprobs] | None) -> float | None:
    return None if logprobs is None else math.fsum(one.logprob for one in logprobs)


def _failed(
    request_id: RequestId, text: str | None, error: RequestError, prompt_token_ids: tuple[int, ...] = ()
) -> RequestOutput:
    sample = CompletionOutput(index=0, text="", token_ids=(), finish_reason="error")
    return RequestOutput(
        request_id=request_id.job_id,
        prompt=text,
        prompt_token_ids=prompt_token_ids,
        outputs=(sample,),
        error=error,
    )


def _per_prompt(
    sampling: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> Sequence[SamplingParams]:
    if sampling is None or isinstance(sampling, SamplingParams):
        return [sampling or SamplingParams()] * count
    if len(sampling) != count:
        raise ValueError(f"sampling_params: {len(sampling)} given for {count} prompts")
    return sampling


class _ProgressBar:
    """tqdm over prompts, with generated tokens per second beside it."""

    def __init__(self, total: int, shown: bool) -> None:
        from tqdm import tqdm

        self._tqdm = tqdm(total=total, disable=not shown, desc="Generated", unit="prompt")
        self._num_tokens = 0

    def __enter__(self) -> _ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self._tqdm.close()

    def took(self, output: RequestOutput) -> None:
        self._num_tokens += sum(len(sample.token_ids) for sample in output.outputs)
        seconds = self._tqdm.format_dict["elapsed"]
        self._tqdm.set_postfix_str(f"{self._num_tokens / max(seconds, 1e-9):.0f} tok/s", refresh=False)
        self._tqdm.update()
