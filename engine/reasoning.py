"""Reasoning told apart from the answer: a state machine over the token ids of one sample.

Owns the two formats in which models think aloud, and where in them the answer begins: `think` (Qwen3, DeepSeek-R1)
and `harmony` (gpt-oss). Works on ids, because text could spell the marks, and a token at a time, so that a stream, a
checkpoint and a whole answer are split alike wherever they are cut. What it needs to know of text it asks the
tokenizer: which tokens are white space, what a channel is called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal, NamedTuple, Protocol

from engine.invalid_parameter import InvalidParameter
from engine.request import Begins, Output
from engine.tokenizer import Tokenizer

ReasoningParser = Literal["auto", "none", "think", "harmony"]

MAX_BLANKS = 4  # tokens of white space behind </think> that are left out
_TAIL = 64  # tokens at the end of a prompt in which an opened message is looked for
_THINK = ("<think>", "</think>")
_HARMONY = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>")
_HARMONY_MORE = ("<|return|>", "<|call|>", "<|constrain|>")  # which some tokenizers may lack


class Part(Enum):
    """What one token is."""

    MARK = "mark"  # of the format: in neither text
    REASONING = "reasoning"
    ANSWER = "answer"


class Stage(Enum):
    """What the next token of a sample will be."""

    UNDECIDED = "undecided"  # the answer's first, or the mark that opens a reasoning
    BEFORE = "before"  # reasoning, or a mark: the answer has not begun
    ANSWER = "answer"


class Splitter(Protocol):
    """One sample's. `stage` is where it stands."""

    stage: Stage

    def push(self, token_id: int) -> Part: ...


class ReasoningFormat(Protocol):
    @property
    def openers(self) -> tuple[int, ...]:
        """The tokens that open a reasoning where nothing is decided yet."""

    def begins(self, prompt: Sequence[int]) -> Begins:
        """How the answer to a chat begins, by the last tokens of its prompt."""

    def splitter(self, begins: Begins) -> Splitter | None:
        """None where all is answer."""


def format_of(tokenizer: Tokenizer, parser: ReasoningParser) -> ReasoningFormat | None:
    """How a model with this tokenizer thinks aloud. `auto`: in the format whose marks are among its tokens, if any.
    Raises `InvalidParameter` for a format whose marks the tokenizer lacks."""
    if parser == "none":
        return None
    for name, marks, make in (("harmony", _HARMONY, _harmony), ("think", _THINK, _think)):
        if parser not in (name, "auto"):
            continue
        ids = [token_id for mark in marks if (token_id := tokenizer.id_of(mark)) is not None]
        if len(ids) == len(marks):
            return make(tokenizer, ids)
        if parser == name:
            raise InvalidParameter(
                "reasoning_parser",
                f"{name} needs the tokens {' '.join(marks)}, which this checkpoint's tokenizer lacks",
            )
    return None


def parts_of(token_ids: Sequence[int], splitter: Splitter | None) -> dict[Part, list[int]]:
    """The next tokens of a sample, by what they are."""
    parts: dict[Part, list[int]] = {part: [] for part in Part}
    if splitter is None:
        parts[Part.ANSWER] = list(token_ids)
    else:
        for token_id in token_ids:
            parts[splitter.push(token_id)].append(token_id)
    return parts


class Told(NamedTuple):
    """One sample as its reader gets it. `reasoning` is None where there is none; `num_reasoning`: its tokens."""

    text: str
    reasoning: str | None = None
    num_reasoning: int = 0


def told(output: Output, tokenizer: Tokenizer, form: ReasoningFormat | None) -> Told:
    """The texts of a sample. White space around its reasoning is left out; a sample that ends within its reasoning
    has no answer."""
    splitter = form.splitter(output.begins) if form else None
    if splitter is None:
        return Told(output.text(tokenizer.decode))
    parts = parts_of(output.shown_ids, splitter)
    reasoning = tokenizer.decode(parts[Part.REASONING]).strip()
    text = tokenizer.decode(parts[Part.ANSWER])[: output.text_cut]
    return Told(text, reasoning or None, len(parts[Part.REASONING]))


# --- think --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Think:
    """`<think>…</think>`, then the answer. Templates write the first mark into the prompt, or both where there is to
    be no reasoning, or leave it to the model. A client may spell the marks, which are no control tokens in most
    vocabularies; so the end of the prompt alone counts, behind its last message."""

    open_id: int
    close_id: int
    is_blank: Callable[[int], bool]

    @property
    def openers(self) -> tuple[int, ...]:
        return (self.open_id,)

    def begins(self, prompt: Sequence[int]) -> Begins:
        last = next((token_id for token_id in reversed(prompt[-_TAIL:]) if not self.is_blank(token_id)), None)
        if last == self.close_id:
            return "answer"
        return "reasoning" if last == self.open_id else "undecided"

    def splitter(self, begins: Begins) -> Splitter | None:
        return None if begins == "answer" else _ThinkSplitter(self, begins)


class _ThinkSplitter:
    """White space between `</think>` and the answer is of the format, as in Qwen3's `</think>\\n\\n`: neither a stop
    string nor a grammar shall find it. Not without bound, for a grammar that begins with some."""

    __slots__ = ("_form", "_num_blanks", "stage")

    def __init__(self, form: Think, begins: Begins) -> None:
        self._form = form
        self._num_blanks = MAX_BLANKS  # that were left out, once a reasoning has ended
        self.stage = Stage.UNDECIDED if begins == "undecided" else Stage.BEFORE

    def push(self, token_id: int) -> Part:
        if self.stage is Stage.BEFORE:
            if token_id != self._form.close_id:
                return Part.REASONING
            self.stage, self._num_blanks = Stage.ANSWER, 0
            return Part.MARK
        if self.stage is Stage.UNDECIDED and token_id == self._form.open_id:
            self.stage = Stage.BEFORE
            return Part.MARK
        self.stage = Stage.ANSWER
        if self._num_blanks < MAX_BLANKS:
            if self._form.is_blank(token_id):
                self._num_blanks += 1
                return Part.MARK
            self._num_blanks = MAX_BLANKS
        return Part.ANSWER


def _think(tokenizer: Tokenizer, marks: Sequence[int]) -> ReasoningFormat:
    open_id, close_id = marks
    return Think(open_id, close_id, lambda token_id: tokenizer.token_bytes(token_id).isspace())


# --- harmony ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Harmony:
    """`<|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…<|return|>`: the answer is
    what the channel `final` says, or a message without a channel; analysis, commentary and any other are reasoning.
    An answer whose first token opens no message is not in this format, and all of it is answer."""

    start_id: int
    channel_id: int
    message_id: int
    ends: frozenset[int]  # <|end|> and whatever else may stand behind a message
    constrain_id: int | None
    decode: Callable[[Sequence[int]], str]

    @property
    def openers(self) -> tuple[int, ...]:
        return (self.channel_id, self.message_id)

    def begins(self, prompt: Sequence[int]) -> Begins:
        tail = list(prompt[-_TAIL:])
        if self.start_id not in tail:
            return "undecided"
        splitter = _HarmonySplitter(self, "reasoning")
        for token_id in tail[-1 - tail[::-1].index(self.start_id) :]:
            splitter.push(token_id)
        if splitter.is_in_header:
            return "undecided"
        return "answer" if splitter.stage is Stage.ANSWER else "reasoning"

    def splitter(self, begins: Begins) -> Splitter | None:
        return None if begins == "answer" else _HarmonySplitter(self, begins)


class _HarmonySplitter:
    __slots__ = ("_form", "_is_whole", "_name", "is_in_header", "stage")

    def __init__(self, form: Harmony, begins: Begins) -> None:
        self._form = form
        self.is_in_header = begins == "undecided"
        self._is_whole = False  # all is answer
        self._name: list[int] | None = None  # of the channel, once its mark has come; None: no channel
        self.stage = Stage.UNDECIDED if begins == "undecided" else Stage.BEFORE

    def push(self, token_id: int) -> Part:
        form = self._form
        if self._is_whole:
            return Part.ANSWER
        if self.stage is Stage.UNDECIDED and token_id not in form.openers:
            self._is_whole, self.stage = True, Stage.ANSWER
            return Part.ANSWER
        if token_id == form.message_id:
            if self.is_in_header:
                self.is_in_header = False
                self.stage = Stage.ANSWER if self._is_final() else Stage.BEFORE
            return Part.MARK
        if token_id in (form.start_id, form.channel_id) or token_id in form.ends:
            self.is_in_header, self.stage = True, Stage.BEFORE
            self._name = [] if token_id == form.channel_id else None
            return Part.MARK
        if self.is_in_header or token_id == form.constrain_id:
            if self._name is not None:
                self._name.append(token_id)
            return Part.MARK
        return Part.ANSWER if self.stage is Stage.ANSWER else Part.REASONING

    def _is_final(self) -> bool:
        """A name may be followed by a recipient and, behind a mark, by a type."""
        if self._name is None:
            return True
        kind = self._form.constrain_id
        name = self._name[: self._name.index(kind)] if kind in self._name else self._name
        return self._form.decode(name).split()[:1] == ["final"]


def _harmony(tokenizer: Tokenizer, marks: Sequence[int]) -> ReasoningFormat:
    start, channel, message, end = marks
    others = {mark: tokenizer.id_of(mark) for mark in _HARMONY_MORE}
    constrain = others.pop("<|constrain|>")
    ends = {end, *(token_id for token_id in others.values() if token_id is not None)}
    return Harmony(start, channel, message, frozenset(ends), constrain, tokenizer.decode)
