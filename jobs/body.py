"""JobBody: what a client may ask of one job, the same over HTTP, Redis and files.

Owns the fields, their names (OpenAI's where OpenAI has one) and every refusal. Refuses to know HTTP, SQL and
tokens: ranges of sampling fields are `engine.sampling_params.SamplingParams`'s own, so that no second opinion about
them can exist. A field that is not understood is refused, never ignored, because a silently dropped `tools` is a
wrong answer by morning.
"""

from __future__ import annotations

from functools import lru_cache
from operator import attrgetter
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from engine.grammar_source import complaint
from engine.sampling_params import (
    InvalidParameter,
    RepetitionDetectionParams,
    SamplingParams,
    StructuredOutputsParams,
)
from jobs.bad_field import BadField, Strict, validated
from jobs.json_text import JsonText, written
from jobs.settings import Settings
from jobs.structured_outputs import ResponseFormat, StructuredOutputs
from jobs.template_kwargs import TemplateKwargs
from jobs.texts import CustomId, Metadata, ModelName, NonEmptyText, Text

MAX_JOB_LOGPROBS = 100_000  # of one job, likeliest tokens included: some 8 MB of JSON
MAX_FORMS = 64  # of one array, each looked at for some 30 ms at most

# fmt: off
# Those that `SamplingParams` takes as they are.
PLAIN_FIELDS = (
    "n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "logit_bias", "bad_words", "allowed_token_ids", "seed", "min_tokens", "stop", "stop_token_ids", "ignore_eos",
    "include_stop_str_in_output",
)
# fmt: on


def _joined(content: object) -> object:
    """A list of text parts becomes the one string it means."""
    if not isinstance(content, list):
        return content
    texts: list[str] = []
    for index, part in enumerate(content):
        if not isinstance(part, dict) or part.keys() != {"type", "text"} or part["type"] != "text":
            raise PydanticCustomError(
                "part",
                "part {index} must be an object of type text with a text; others are not supported yet",
                {"index": index},
            )
        if not isinstance(part["text"], str):
            raise PydanticCustomError("part", "part {index} must have a string as its text", {"index": index})
        texts.append(part["text"])
    if not texts:
        raise PydanticCustomError("part", "must be a string or a list of at least one text part")
    return "".join(texts)


def _listed(stop: object) -> object:
    return [stop] if isinstance(stop, str) else stop


class _Part(Strict):
    """How a part of a message is described; it is checked by `_joined`, which can say what is wrong."""

    type: Literal["text"]
    text: str


class Message(Strict):
    role: Literal["system", "user", "assistant"]
    content: Annotated[Text, BeforeValidator(_joined, json_schema_input_type=str | list[_Part])]


class Repetition(Strict):
    max_pattern_size: int
    min_pattern_size: int | None = None
    min_count: int | None = None


class JobBody(Strict):
    """One prompt or chat and how to sample from it. null means the same as leaving a field out."""

    model: ModelName | None = None
    prompt: NonEmptyText | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    chat_template_kwargs: TemplateKwargs | None = None

    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None  # token ids are JSON's keys, hence strings
    bad_words: list[Text] | None = None
    allowed_token_ids: list[int] | None = None
    seed: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None  # OpenAI's newer name of max_tokens
    min_tokens: int | None = None
    stop: (
        Annotated[list[Text], BeforeValidator(_listed, json_schema_input_type=str | list[str] | None)] | None
    ) = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    repetition_detection: Repetition | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    structured_outputs: StructuredOutputs | None = None
    response_format: ResponseFormat | None = None

    custom_id: CustomId | None = None
    metadata: Metadata | None = None

    @model_validator(mode="after")
    def _one_of(self) -> JobBody:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("one_of:prompt", "give exactly one of prompt and messages")
        if self.chat_template_kwargs is not None and self.messages is None:
            raise PydanticCustomError(
                "one_of:chat_template_kwargs", "goes with messages; a prompt has no template"
            )
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise PydanticCustomError(
                "one_of:max_completion_tokens", "give max_tokens or max_completion_tokens, not both"
            )
        if self.structured_outputs is not None and self.response_format is not None:
            raise PydanticCustomError(
                "one_of:response_format", "give structured_outputs or response_format, not both"
            )
        return self

    @property
    def opening(self) -> str:
        """The text that jobs of one kind share: the first system message, else the start of the prompt."""
        if self.messages is None:
            return self.prompt or ""
        return next((m.content for m in self.messages if m.role == "system"), self.messages[0].content)

    def stored(self) -> dict[str, Any]:
        """As `models.Job.body` keeps it; `JobBody.model_validate` reads it back."""
        return self.model_dump(mode="json", exclude_none=True, by_alias=True)

    def written(self) -> JsonText:
        """The same as its column keeps it."""
        given = {name: value for name, value in self.__dict__.items() if value is not None}
        if self.messages is not None:
            given["messages"] = [{"role": one.role, "content": one.content} for one in self.messages]
        return written(given if given.keys().isdisjoint(_NESTED) else self.stored())

    def length_limit(self, default_max_tokens: int) -> int:
        """The most tokens that one sample may have."""
        given = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return max(default_max_tokens, self.min_tokens or 0) if given is None else given

    def sampling(self, default_max_tokens: int, max_n: int) -> SamplingParams:
        """The engine's parameters. `seed` may still be None; the job's stored seed replaces it. Jobs of one batch
        mostly ask for the same: plain numbers are checked once.

        Raises `engine.sampling_params.InvalidParameter` under the name that the client used.
        """
        try:
            return _known_sampling(_Wish(self, _asked(self)), default_max_tokens, max_n)
        except TypeError:  # a list cannot be looked up
            return self._sampling(default_max_tokens, max_n)

    def _sampling(self, default_max_tokens: int, max_n: int) -> SamplingParams:
        given: dict[str, Any] = {
            name: value for name in PLAIN_FIELDS if (value := getattr(self, name)) is not None
        }
        if self.n is not None and not 1 <= self.n <= max_n:
            raise InvalidParameter("n", f"must be an integer from 1 to {max_n}")
        length = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        max_tokens = self.length_limit(default_max_tokens)
        try:
            if self.repetition_detection is not None:
                given["repetition_detection"] = RepetitionDetectionParams(
                    **self.repetition_detection.model_dump(exclude_none=True)
                )
            form = self.structured_outputs or self.response_format
            if form is not None:
                given["structured_outputs"] = form.params()
            if self.logprobs:
                given["logprobs"] = self.top_logprobs or 0
            elif self.top_logprobs:
                raise InvalidParameter("top_logprobs", "needs logprobs to be true")
            sampling = SamplingParams(max_tokens=max_tokens, **given)
        except InvalidParameter as error:
            name = {"max_tokens": length, "logprobs": "top_logprobs"}.get(error.param, error.param)
            raise InvalidParameter(name, error.message) from None
        if sampling.logprobs is not None:
            count = sampling.n * max_tokens * (1 + sampling.logprobs)
            if count > MAX_JOB_LOGPROBS:
                raise InvalidParameter(
                    "logprobs",
                    f"n × {length} × (1 + top_logprobs) may be at most {MAX_JOB_LOGPROBS}, and is {count}",
                )
        return sampling


_NESTED = frozenset({"repetition_detection", "structured_outputs", "response_format"})
# Of a body: all values beside its texts.
_asked = attrgetter(
    *(
        JobBody.model_fields.keys()
        - {"model", "prompt", "messages", "chat_template_kwargs", "custom_id", "metadata"}
    )
)


class _Wish:
    """What a body asks of the engine, beside its texts: as good as another one's with the same values."""

    __slots__ = ("_hash", "_values", "body")

    def __init__(self, body: JobBody, values: tuple[object, ...]) -> None:
        self.body: JobBody | None = body
        self._values = values
        self._hash = hash(values)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Wish) and self._values == other._values


@lru_cache(maxsize=64)
def _known_sampling(wish: _Wish, default_max_tokens: int, max_n: int) -> SamplingParams:
    body, wish.body = wish.body, None  # what is remembered must not keep its texts
    assert body is not None
    return body._sampling(default_max_tokens, max_n)


def parse_job(data: object, settings: Settings, *, forms: bool = False) -> JobBody:
    """The body of one job, wholly checked. `forms`: also whether a model can be held to the form that it asks for (a
    broken expression, a keyword that would be ignored), for clients who would else hear of it by morning. Raises
    `BadField` for the first thing that is wrong."""
    body, sampling = _parsed(data, settings)
    if forms and sampling.structured_outputs is not None:
        _refuse_form(sampling.structured_outputs)
    return body


def _parsed(data: object, settings: Settings) -> tuple[JobBody, SamplingParams]:
    body = validated(JobBody, data)
    texts = [body.prompt] if body.messages is None else [message.content for message in body.messages]
    if sum(len(text or "") for text in texts) > settings.max_body_bytes:
        param = "prompt" if body.messages is None else "messages"
        raise BadField(param, f"has more than {settings.max_body_bytes} characters")
    try:
        return body, body.sampling(settings.default_max_tokens, settings.max_n)
    except InvalidParameter as error:
        raise BadField(error.param, error.message) from None


def _refuse_form(form: StructuredOutputsParams) -> None:
    if (why := complaint(form)) is not None:
        raise BadField(form.param, why)


def read_job(data: object) -> JobBody:
    """A body that `parse_job` has accepted before: its shape alone is looked at. Raises `BadField`."""
    return validated(JobBody, data)


class _WithMetadata(Strict):
    metadata: Metadata | None = None


def parse_metadata(data: object) -> dict[str, str]:
    """A batch's own metadata, under the same rules as a job's. Raises `BadField`."""
    return validated(_WithMetadata, {"metadata": data}).metadata or {}


def parse_jobs(jobs: object, settings: Settings) -> list[JobBody]:
    """The bodies of an array of jobs, and the first `MAX_FORMS` different forms that they ask for; a later form that
    nobody can be held to fails its job alone. Raises `BadField`; its param begins with `jobs` or `jobs[i]`."""
    if not isinstance(jobs, list):
        raise BadField("jobs", "must be an array of jobs", "invalid_type")
    if not 1 <= len(jobs) <= settings.max_array_jobs:
        raise BadField("jobs", f"must hold 1 to {settings.max_array_jobs} jobs, got {len(jobs)}")
    bodies: list[JobBody] = []
    forms: set[StructuredOutputsParams] = set()
    for index, one in enumerate(jobs):
        try:
            body, sampling = _parsed(one, settings)
            if (form := sampling.structured_outputs) is not None and len(forms) < MAX_FORMS:
                _refuse_form(form)
                forms.add(form)
        except BadField as error:
            raise error.inside(f"jobs[{index}]") from None
        bodies.append(body)
    return bodies
