"""The words that cross the door between jobs and engine: what is asked for and what came out.

Owns `SamplingParams`, `Request`, `Completion`, what they hold, and the errors that belong to one request.
Knows nothing of text, SQL, tensors or time: a request is token ids in, a completion is token ids out. Standard
library only, because the API, the worker and the command line all import it and none of them may load torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

FinishReason = Literal["stop", "length", "repetition"]

MAX_N = 128  # OpenAI's limit on samples per request
MAX_TOP_K = 4096  # candidates kept per row; wider filters are indistinguishable from top_k off
MAX_LOGPROBS = 20  # OpenAI's and vLLM's limit on likeliest tokens per position
MAX_PENALTY = 2.0  # OpenAI's range, on both sides of 0
MAX_LOGIT_BIAS = 100.0  # OpenAI's range, on both sides of 0
MAX_LOGIT_BIASES = 1024  # vLLM's limit
MAX_ALLOWED_TOKEN_IDS = 4096
MAX_BAD_WORDS = 128
MAX_BAD_WORD_CHARS = 256
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 256
MAX_STOP_TOKEN_IDS = 256
MAX_PATTERN_SIZE = 256  # tokens of a loop that is looked for
MAX_PATTERN_COUNT = 1024
MAX_SEED = 2**63 - 1


class InvalidParameter(ValueError):
    """A field of a request has a value that cannot be honoured. `param` names the field."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(f"{param}: {message}")
        self.param = param
        self.message = message


class Rejected(ValueError):
    """A whole request cannot run on this engine (too long for the model, or for the KV memory).

    `code` is stable and machine readable; the message says what is allowed.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@dataclass(frozen=True, slots=True, kw_only=True)
class RepetitionDetectionParams:
    """A sample that ends in the same pattern of tokens, `min_count` times in a row, is stopped there (named as in
    vLLM). Raises `InvalidParameter`."""

    max_pattern_size: int
    min_pattern_size: int = 1
    min_count: int = 2

    def __post_init__(self) -> None:
        for name, low, high in (
            ("max_pattern_size", 1, MAX_PATTERN_SIZE),
            ("min_pattern_size", 1, MAX_PATTERN_SIZE),
            ("min_count", 2, MAX_PATTERN_COUNT),
        ):
            _integer(f"repetition_detection.{name}", getattr(self, name), low, high)
        if self.min_pattern_size > self.max_pattern_size:
            raise InvalidParameter(
                "repetition_detection.min_pattern_size",
                f"must not exceed max_pattern_size ({self.max_pattern_size})",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens. Field names and defaults follow vLLM's class of the same name.

    Validated once, here, for Python, HTTP and Redis alike: raises `InvalidParameter`.
    """

    n: int = 1
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # nucleus sampling (Holtzman et al. 2019); 1 is off
    top_k: int = 0  # 0 (or -1) is off
    min_p: float = 0.0  # the least probability, as a share of the likeliest token's (Nguyen et al. 2024)
    presence_penalty: float = 0.0  # taken off the logit of every token that was generated (OpenAI)
    frequency_penalty: float = 0.0  # the same, times how often it was generated
    repetition_penalty: float = 1.0  # on prompt and generated tokens (Keskar et al. 2019); 1 is off
    logit_bias: tuple[tuple[int, float], ...] | dict[int, float] = ()  # added; kept as pairs, by id
    bad_words: tuple[str, ...] = ()  # the token that would complete one is not chosen
    allowed_token_ids: tuple[int, ...] | None = None  # no others are chosen; kept in order
    seed: int | None = None
    max_tokens: int | None = 16  # None: as many as the context leaves room for
    min_tokens: int = 0  # no end of sequence, stop token or stop string before so many tokens
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False  # stop strings and stop tokens are kept in the text
    ignore_eos: bool = False
    repetition_detection: RepetitionDetectionParams | None = None  # stop a sample that loops
    logprobs: int | None = None  # None is off; 0: of each chosen token; k: of the k likeliest as well

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", _strings("stop", self.stop, MAX_STOP_STRINGS, MAX_STOP_STRING_CHARS))
        object.__setattr__(self, "stop_token_ids", _items("stop_token_ids", self.stop_token_ids))
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        _integer("n", self.n, 1, MAX_N)
        _number("temperature", self.temperature, 0.0, 2.0)
        _number("top_p", self.top_p, 0.0, 1.0, above=True)
        _integer("top_k", self.top_k, 0, MAX_TOP_K)
        _number("min_p", self.min_p, 0.0, 1.0)
        for name in ("presence_penalty", "frequency_penalty"):
            _number(name, getattr(self, name), -MAX_PENALTY, MAX_PENALTY)
        _number("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        object.__setattr__(
            self, "bad_words", _strings("bad_words", self.bad_words, MAX_BAD_WORDS, MAX_BAD_WORD_CHARS)
        )
        if self.allowed_token_ids is not None:
            object.__setattr__(self, "allowed_token_ids", _allowed(self.allowed_token_ids))
        if self.seed is not None:
            _integer("seed", self.seed, -MAX_SEED - 1, MAX_SEED)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, 2**31)
        _integer("min_tokens", self.min_tokens, 0, 2**31)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidParameter("min_tokens", f"must not exceed max_tokens ({self.max_tokens})")
        for name in ("ignore_eos", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidParameter(name, "must be true or false")
        if not isinstance(self.repetition_detection, RepetitionDetectionParams | None):
            raise InvalidParameter(
                "repetition_detection", "must be a RepetitionDetectionParams, or be left out"
            )
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise InvalidParameter("stop_token_ids", f"at most {MAX_STOP_TOKEN_IDS} ids are allowed")
        for token_id in self.stop_token_ids:
            _integer("stop_token_ids", token_id, 0, 2**31)

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """`logit_bias` as it is kept."""
        assert isinstance(self.logit_bias, tuple)
        return self.logit_bias

    def end_token_ids(self, eos_token_ids: tuple[int, ...]) -> tuple[int, ...]:
        """The tokens that end a sample, for a model whose ends of sequence are these."""
        return self.stop_token_ids + (() if self.ignore_eos else eos_token_ids)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


def _integer(param: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidParameter(param, f"must be an integer from {low} to {high}")


def _number(param: str, value: object, low: float, high: float, *, above: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidParameter(param, "must be a number")
    if not (low < value <= high if above else low <= value <= high):  # also refuses NaN
        raise InvalidParameter(
            param, f"must be {'above' if above else 'at least'} {low:g} and at most {high:g}"
        )


def _items(param: str, given: Any) -> tuple[Any, ...]:
    """None means nothing."""
    try:
        return tuple(given or ())
    except TypeError:
        raise InvalidParameter(param, "must be a list") from None


def _strings(param: str, given: Any, most: int, longest: int) -> tuple[str, ...]:
    """Callers may also pass one string, a list or None."""
    texts = (given,) if isinstance(given, str) else _items(param, given)
    if len(texts) > most:
        raise InvalidParameter(param, f"at most {most} strings are allowed")
    for text in texts:
        if not isinstance(text, str) or not 1 <= len(text) <= longest:
            raise InvalidParameter(param, f"each must be a string of 1 to {longest} characters")
    return texts


def _biases(given: Any) -> tuple[tuple[int, float], ...]:
    """A map of token ids to numbers, or such pairs. JSON has ids as strings."""
    pairs = _items("logit_bias", given.items() if isinstance(given, Mapping) else given)
    if len(pairs) > MAX_LOGIT_BIASES:
        raise InvalidParameter("logit_bias", f"at most {MAX_LOGIT_BIASES} token ids are allowed")
    biases: dict[int, float] = {}
    for pair in pairs:
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise InvalidParameter("logit_bias", "must map token ids to numbers")
        token_id, bias = pair
        if isinstance(token_id, str) and token_id.isascii() and token_id.isdigit() and len(token_id) <= 10:
            token_id = int(token_id)
        _integer("logit_bias", token_id, 0, 2**31)
        _number("logit_bias", bias, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)
        if token_id in biases:
            raise InvalidParameter("logit_bias", f"names the token id {token_id} twice")
        biases[token_id] = float(bias)
    return tuple(sorted(biases.items()))


def _allowed(given: Any) -> tuple[int, ...]:
    ids = _items("allowed_token_ids", given)
    if not 1 <= len(ids) <= MAX_ALLOWED_TOKEN_IDS:
        raise InvalidParameter(
            "allowed_token_ids", f"must have 1 to {MAX_ALLOWED_TOKEN_IDS} ids, or be left out"
        )
    for token_id in ids:
        _integer("allowed_token_ids", token_id, 0, 2**31)
    return tuple(sorted(set(ids)))


class RequestId(NamedTuple):
    """Who asked: the job and the fence of the claim. A stale fence makes a stale answer recognisable."""

    job_id: str
    fence: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """What one sample had made when it was interrupted: a resumed request goes on behind it.

    `logprobs`: one per token if the request asks for them, else nothing."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A job as the engine sees it. `sampling.seed` is always set here (`derive_seed`).

    `cache_salt`: only requests with the same salt share computed prefixes, so that response times tell nobody
    what others have asked. `priority`: lower runs first, and preempts higher ones; `deadline`: unix seconds,
    earlier runs first among equals. `generated`: a checkpoint, one entry per sample, or nothing.
    """

    id: RequestId
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    cache_salt: str = ""
    priority: int = 0
    deadline: float | None = None
    generated: tuple[Generated, ...] = ()


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from anything with a stable `str`: sample k of seed s is `derive_seed(s, k)`."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """How likely one generated token was: natural logarithms of the softmax over the step's raw logits.

    Raw: before min_tokens, temperature and filters (vLLM's `raw_logprobs`). Values are those of a float32. `top`
    holds (token id, logprob) of the `SamplingParams.logprobs` likeliest tokens, descending, ties by the lower
    id; the chosen token need not be among them.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """One sample of a completion.

    `token_ids` are exact and are what is billed. `text_cut`, when a stop string was met, is the number of
    characters of the decoded text that belong to the answer; `last_is_silent`: the token that ended it adds nothing
    to the text. `stop_reason` is the stop string or stop token
    id that ended it; None for end of sequence, `length` and `repetition`. `logprobs` has one entry per token of
    `token_ids`; None when they were not asked for.
    """

    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    text_cut: int | None = None
    last_is_silent: bool = False
    logprobs: tuple[TokenLogprobs, ...] | None = None

    def text(self, decode: Callable[[tuple[int, ...]], str]) -> str:
        """What the user reads, by the tokenizer's `decode`."""
        return decode(self.token_ids[:-1] if self.last_is_silent else self.token_ids)[: self.text_cut]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestError:
    """Why one request failed. `code`: `numerics`, `context_length_exceeded`, `kv_capacity_exceeded`,
    `invalid_request`."""

    code: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """The answer to one request: `n` outputs, or an error, or the tokens made before an abort.

    `num_generated` counts every generated token of all samples, the discarded surplus after a stop string
    excluded, so that an aborted or failed request can still be booked.
    """

    id: RequestId
    outputs: tuple[Output, ...] = ()
    error: RequestError | None = None
    aborted: bool = False
    num_prompt: int = 0
    num_generated: int = 0
    num_cached_tokens: int = field(default=0)
