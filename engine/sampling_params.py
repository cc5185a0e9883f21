"""SamplingParams: how the tokens of a request are chosen and what ends it.

Owns the fields and their limits. Validated once, here, for Python, HTTP, Redis and files alike,
so that no second opinion about a field can exist. Knows no model: token ids that a vocabulary lacks are refused
by `vocabulary`. Standard library only, because the API, the worker and the command line import it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.invalid_parameter import InvalidParameter as InvalidParameter
from engine.structured_outputs import StructuredOutputsParams as StructuredOutputsParams

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
    top_p: float = 1.0  # nucleus sampling (Holtzman et al. 2019); 1 is off, 0 is greedy, as with OpenAI
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
    prompt_logprobs: int | None = None  # the same for each token of the prompt but the first
    structured_outputs: StructuredOutputsParams | None = None  # the form that the text must have

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", _strings("stop", self.stop, MAX_STOP_STRINGS, MAX_STOP_STRING_CHARS))
        object.__setattr__(self, "stop_token_ids", _items("stop_token_ids", self.stop_token_ids))
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        _integer("n", self.n, 1, MAX_N)
        _number("temperature", self.temperature, 0.0, 2.0)
        _number("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:  # the smallest nucleus: the likeliest token alone
            object.__setattr__(self, "temperature", 0.0)
            object.__setattr__(self, "top_p", 1.0)
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
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 0, MAX_LOGPROBS)
        if self.structured_outputs is not None:
            self._check_structured_outputs()
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise InvalidParameter("stop_token_ids", f"at most {MAX_STOP_TOKEN_IDS} ids are allowed")
        for token_id in self.stop_token_ids:
            _integer("stop_token_ids", token_id, 0, 2**31)

    def _check_structured_outputs(self) -> None:
        """A grammar says what may come and when it ends; what says the same once more could contradict it."""
        if not isinstance(self.structured_outputs, StructuredOutputsParams):
            raise InvalidParameter("structured_outputs", "must be a StructuredOutputsParams, or be left out")
        for name in ("ignore_eos", "min_tokens", "allowed_token_ids"):
            if getattr(self, name):
                raise InvalidParameter(name, "cannot be combined with structured_outputs")

    def seeded(self, seed: int) -> SamplingParams:
        """The same with this seed. All else has been checked, which takes longer than to copy it. Raises
        `InvalidParameter`."""
        _integer("seed", seed, -MAX_SEED - 1, MAX_SEED)
        made = object.__new__(SamplingParams)
        for name in self.__slots__:
            object.__setattr__(made, name, getattr(self, name))
        object.__setattr__(made, "seed", seed)
        return made

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

    @property
    def narrows(self) -> bool:
        """Whether a token is drawn, and not from all of the vocabulary."""
        return not self.greedy and (self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0)


def _integer(param: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidParameter(param, f"must be an integer from {low} to {high}")


def _number(param: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidParameter(param, "must be a number")
    if not low <= value <= high:  # also refuses NaN
        raise InvalidParameter(param, f"must be at least {low:g} and at most {high:g}")


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
