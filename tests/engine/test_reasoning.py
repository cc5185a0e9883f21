"""Reasoning is told apart from the answer by token ids: in both formats, wherever the tokens are cut, and for stop
strings and grammars, which are the answer's.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import LLM, SamplingParams, StructuredOutputsParams
from engine.engine import Engine
from engine.grammars import Grammars
from engine.invalid_parameter import InvalidParameter
from engine.matcher import Matcher, fill
from engine.reasoning import MAX_BLANKS, Part, ReasoningFormat, format_of, told
from engine.request import Begins, FinishReason, Generated, Output, Request, RequestId
from engine.run import identity
from engine.special_tokens import SpecialTokens
from engine.stop import StopChecker
from engine.tokenizer import Tokenizer
from tests.support.thinking import CHOICE, CLOSE_ID, HARMONY, OPEN_ID, THINK, with_marks, write_thinking_llama
from tests.support.tiny import EOS_TOKEN_ID
from tests.support.tiny_tokenizers import KINDS

TEXT_KINDS = ["byte-level", "pieces, first", "unigram"]


def tokenizer_of(marks: tuple[str, ...], kind: str = "byte-level", *, special: bool) -> Tokenizer:
    made = with_marks(KINDS[kind](), marks, special=special)
    return Tokenizer(made.to_str(), template=None, special_tokens=SpecialTokens())


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokens of a text in which marks are marks."""
    ids: list[int] = []
    for part in re.split("|".join(f"({re.escape(mark)})" for mark in (*THINK, *HARMONY)), text):
        if part:
            token_id = tokenizer.id_of(part) if part in (*THINK, *HARMONY) else None
            ids += tokenizer.encode_part(part) if token_id is None else [token_id]
    return ids


def split(
    tokenizer: Tokenizer, form: ReasoningFormat, begins: Begins, ids: list[int], **more: Any
) -> tuple[str, str | None]:
    reason: FinishReason = "length"
    output = Output(token_ids=tuple(ids), finish_reason=reason, begins=begins, **more)
    text, reasoning, _ = told(output, tokenizer, form)
    return text, reasoning


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize(
    ("prompt", "made", "begins", "text", "reasoning"),
    [
        ("hi", "<think>\nhm, so.\n</think>\n\nThe fox", "undecided", "The fox", "hm, so."),
        ("hi<think>\n", "hm</think>\n\nThe fox", "reasoning", "The fox", "hm"),
        ("hi<think>", "hm</think>The</think> fox", "reasoning", "The</think> fox", "hm"),
        ("hi<think>\n\n</think>\n\n", "The <think>fox", "answer", "The <think>fox", None),
        ("hi<think>\n\n</think>\n\nfox", "</think>", "undecided", "</think>", None),
        ("<think>hi", "The fox<think>x</think>", "undecided", "The fox<think>x</think>", None),
        ("hi", "\n<think>", "undecided", "\n<think>", None),
        ("hi", "<think>\n\n</think>\n\n", "undecided", "", None),
        ("hi<think>", "hm, so", "reasoning", "", "hm, so"),
        ("hi", "", "undecided", "", None),
    ],
)
def test_think(
    special: bool, prompt: str, made: str, begins: Begins, text: str, reasoning: str | None
) -> None:
    tokenizer = tokenizer_of(THINK, special=special)
    form = format_of(tokenizer, "think")
    assert form is not None
    assert form.begins(ids_of(tokenizer, prompt)) == begins
    found = split(tokenizer, form, begins, ids_of(tokenizer, made))
    visible = re.sub("|".join(THINK), "", text) if special else text  # control tokens are in no text
    assert found == (visible, reasoning)


ANALYSIS = "<|channel|>analysis<|message|>hm, so.<|end|>"
FINAL = "<|start|>assistant<|channel|>final<|message|>The fox"


@pytest.mark.parametrize(
    ("prompt", "made", "begins", "text", "reasoning"),
    [
        ("<|start|>assistant", ANALYSIS + FINAL + "<|return|>", "undecided", "The fox", "hm, so."),
        ("<|start|>assistant", "<|channel|>final<|message|>The fox<|return|>", "undecided", "The fox", None),
        ("<|start|>assistant", "<|message|>The fox<|return|>", "undecided", "The fox", None),
        ("<|start|>assistant", ANALYSIS + "<|start|>assistant<|chan", "undecided", "", "hm, so."),
        ("<|start|>assistant", ANALYSIS + ANALYSIS[:-7], "undecided", "", "hm, so.hm, so."),
        (
            "<|start|>assistant",
            "<|channel|>commentary to=x <|constrain|>json<|message|>{}<|call|>" + FINAL,
            "undecided",
            "The fox",
            "{}",
        ),
        (
            "<|start|>assistant",
            "<|channel|>final <|constrain|>json<|message|>{}<|end|>" + FINAL,
            "undecided",
            "{}The fox",
            None,
        ),
        ("<|start|>assistant", "<|channel|>analysis<|message|>a<|channel|>final<|message|>b", *"?ba"),
        ("<|start|>assistant", "The fox" + ANALYSIS, "undecided", "The foxanalysishm, so.", None),
        ("<|start|>assistant<|channel|>analysis<|message|>", "a<|end|>" + FINAL, "reasoning", "The fox", "a"),
        ("<|start|>assistant<|channel|>final<|message|>", "The" + ANALYSIS, "answer", "Theanalysishm, so.", None),
        ("hi", "The fox", "undecided", "The fox", None),
    ],
)  # fmt: skip
def test_harmony(prompt: str, made: str, begins: Any, text: str, reasoning: str | None) -> None:
    tokenizer = tokenizer_of(HARMONY, special=True)
    form = format_of(tokenizer, "auto")
    assert form is not None
    begins = "undecided" if begins == "?" else begins
    assert form.begins(ids_of(tokenizer, "<|start|>user<|message|>hi<|end|>" + prompt)) == begins
    assert split(tokenizer, form, begins, ids_of(tokenizer, made)) == (text, reasoning)


@pytest.mark.parametrize("kind", TEXT_KINDS)
@pytest.mark.parametrize("marks", [THINK, HARMONY])
def test_any_cut_is_split_alike(kind: str, marks: tuple[str, ...]) -> None:
    """Of random tokens: what a token is does not change with what comes behind it, and all that is made of a sample
    is made of its parts."""
    tokenizer = tokenizer_of(marks, kind, special=marks is HARMONY)
    form = format_of(tokenizer, "auto")
    assert form is not None
    draw = random.Random(4)
    words = [*tokenizer.encode_part("\nanalysis final the fox"), *filter(None, map(tokenizer.id_of, marks))]
    begins: Begins
    for begins in ("undecided", "reasoning", "undecided", "answer") * 60:
        ids = [draw.choice(words) for _ in range(30)]
        if draw.random() < 0.8:
            ids[0] = form.openers[0]
        splitter = form.splitter(begins)
        parts = [splitter.push(token_id) if splitter else Part.ANSWER for token_id in ids]
        for cut in range(len(ids) + 1):
            again = form.splitter(begins)
            assert [again.push(one) if again else Part.ANSWER for one in ids[:cut]] == parts[:cut]
            text, reasoning = split(tokenizer, form, begins, ids[:cut])
            of = {part: [i for i, p in zip(ids[:cut], parts, strict=False) if p is part] for part in Part}
            assert text == tokenizer.decode(of[Part.ANSWER])
            assert (reasoning or "") == tokenizer.decode(of[Part.REASONING]).strip()


def test_white_space_behind_a_reasoning_has_a_bound() -> None:
    tokenizer = tokenizer_of(THINK, special=False)
    form = format_of(tokenizer, "think")
    assert form is not None
    (blank,) = tokenizer.encode_part("\n")
    ids = ids_of(tokenizer, "</think>") + [blank] * (MAX_BLANKS + 2)
    assert split(tokenizer, form, "reasoning", ids) == ("\n\n", None)


def test_a_format_is_that_of_the_marks() -> None:
    think, harmony = tokenizer_of(THINK, special=False), tokenizer_of(HARMONY, special=True)
    plain = tokenizer_of((), special=False)  # it knows <think>, but not </think>
    assert [type(format_of(one, "auto")).__name__ for one in (think, harmony, plain)] == [
        "Think",
        "Harmony",
        "NoneType",
    ]
    assert format_of(think, "none") is None
    for tokenizer, parser, missing in (
        (plain, "think", "</think>"),
        (think, "harmony", "<|channel|>"),
        (harmony, "think", "</think>"),
    ):
        with pytest.raises(InvalidParameter, match=re.escape(missing)) as caught:
            format_of(tokenizer, parser)  # type: ignore[arg-type]
        assert caught.value.param == "reasoning_parser"


@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_stop_strings_are_looked_for_in_the_answer(kind: str) -> None:
    """As in the answer alone; the tokens that are kept end with the one that completed the string."""
    tokenizer = tokenizer_of(THINK, kind, special=False)
    form = format_of(tokenizer, "think")
    assert form is not None
    reasoning = ids_of(tokenizer, "the fox, the fox</think>")
    blanks = 2 * ids_of(tokenizer, " ") if kind == "byte-level" else []
    draw = random.Random(6)
    words = tokenizer.encode_part("the fox he x aab abaa oxo ")
    found = 0
    for _ in range(150):
        answer = tokenizer.encode_part("the") + [draw.choice(words) for _ in range(20)]
        stop, least = draw.choice([("he x",), ("fox", "x"), ("aab", "oxo")]), draw.choice([0, 4, 9])
        before = len(reasoning) + len(blanks)
        alone = StopChecker(tokenizer, stop, least)
        beside = StopChecker(tokenizer, stop, least + before, form.splitter("reasoning"))
        for token_id in (*reasoning, *blanks):
            assert beside.push(token_id) is None
        for place, token_id in enumerate(answer, 1):
            one = alone.push(token_id, last=place == len(answer))
            other = beside.push(token_id, last=place == len(answer))
            assert other == (one and one._replace(num_tokens=one.num_tokens + before))
            if one is not None:
                found += 1
                break
    assert found > 20


# --- with a model -------------------------------------------------------------------------------------------

CHAT = [{"role": "user", "content": "What is a fox?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_thinking_llama(tmp_path_factory.mktemp("thinking"))


def loaded(folder: Path, **settings: Any) -> LLM:
    fixed = {"device": "cpu", "dtype": "float32", "kv_cache_memory_bytes": 2**24, "threads": 1}
    return LLM(str(folder), use_tqdm=False, **fixed | settings)


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    return loaded(folder)


def closing(**more: Any) -> SamplingParams:
    biases = {CLOSE_ID: 3.0, EOS_TOKEN_ID: -100.0}
    return SamplingParams(**{"max_tokens": 60, "seed": 3, "logit_bias": biases} | more)


def test_a_chat_has_both_texts(llm: LLM) -> None:
    (answer,) = llm.chat(CHAT, closing(n=4, logprobs=0), use_tqdm=False)
    assert llm.tokenizer.decode(answer.prompt_token_ids).endswith("<think>\n")
    whole = 0
    for sample in answer.outputs:
        ids = list(sample.token_ids)
        assert sample.logprobs is not None
        assert len(sample.logprobs) == len(ids)
        cut = ids.index(CLOSE_ID) if CLOSE_ID in ids else len(ids)
        whole += cut < len(ids) - 1
        assert (sample.reasoning or "") == llm.tokenizer.decode(ids[:cut]).strip()
        assert sample.text.strip() == llm.tokenizer.decode(ids[cut + 1 :]).strip()
    assert whole
    (raw,) = llm.generate(
        {"prompt_token_ids": answer.prompt_token_ids}, closing(n=4, logprobs=0), use_tqdm=False
    )
    assert [one.token_ids for one in raw.outputs] == [one.token_ids for one in answer.outputs]
    for sample in raw.outputs:
        assert sample.reasoning is None
        assert sample.text == llm.tokenizer.decode(sample.token_ids)
    (hushed,) = llm.chat(CHAT, closing(), use_tqdm=False, chat_template_kwargs={"enable_thinking": False})
    assert hushed.outputs[0].reasoning is None
    assert hushed.outputs[0].text == llm.tokenizer.decode(hushed.outputs[0].token_ids)


def test_a_stop_string_ends_the_answer_alone(llm: LLM) -> None:
    (free,) = llm.chat(CHAT, closing(n=4), use_tqdm=False)
    sample = next(one for one in free.outputs if one.reasoning and len(one.text) > 8)
    stops = (sample.reasoning[1:3], sample.text[5:8])  # type: ignore[index]
    (cut,) = llm.chat(CHAT, closing(n=4, stop=stops), use_tqdm=False)
    stopped = cut.outputs[sample.index]
    assert stopped.reasoning == sample.reasoning
    assert stopped.finish_reason == "stop"
    at = min(place for stop in stops if (place := sample.text.find(stop)) >= 0)
    assert stopped.text == sample.text[:at]
    assert stopped.token_ids == sample.token_ids[: len(stopped.token_ids)]


@pytest.mark.parametrize("ending", ["opened", "left to the model"])
def test_a_form_is_that_of_the_answer(llm: LLM, folder: Path, tmp_path: Path, ending: str) -> None:
    """The model reasons as it likes, though what it thinks is not of the form, and then its answer is."""
    form = StructuredOutputsParams(regex="[a-c]{3,9}")
    biases = {CLOSE_ID: 3.0, EOS_TOKEN_ID: 3.0}  # no end comes before the answer, however much it is wanted
    if ending != "opened":
        llm = loaded(write_thinking_llama(tmp_path, ending=CHOICE))
        biases[OPEN_ID] = 2.0
    sampling = SamplingParams(n=8, max_tokens=200, seed=3, logit_bias=biases, structured_outputs=form)
    (answer,) = llm.chat(CHAT, sampling, use_tqdm=False)
    reasoned = 0
    for sample in answer.outputs:
        if sample.finish_reason == "stop":
            assert re.fullmatch("[a-c]{3,9}", sample.text), sample.text
            reasoned += bool(sample.reasoning) and not re.fullmatch("[a-c]*", sample.reasoning or "")
    assert reasoned
    unbiased = SamplingParams(n=4, max_tokens=200, seed=3, structured_outputs=form)
    for sample in llm.chat(CHAT, unbiased, use_tqdm=False, chat_template_kwargs={"enable_thinking": False})[
        0
    ].outputs:
        assert re.fullmatch("[a-c]{3,9}", sample.text)


def test_a_resumed_sample_is_the_same(llm: LLM) -> None:
    """Cut anywhere: in its reasoning, at a mark, in its answer; with stop strings and with a form."""
    engine, biases = llm.engine, {CLOSE_ID: 6.0, EOS_TOKEN_ID: -100.0}
    form = StructuredOutputsParams(regex="[a-c]{3,9}")
    for sampling in (
        closing(max_tokens=24, logit_bias=biases, stop=("qq",)),
        closing(max_tokens=24, logit_bias={CLOSE_ID: 6.0}, structured_outputs=form),
    ):
        prompt = tuple(llm.tokenizer.encode_chat(CHAT))
        whole = finished(engine, prompt, sampling, ())
        assert CLOSE_ID in whole.token_ids
        for cut in range(1, len(whole.token_ids)):
            assert finished(engine, prompt, sampling, whole.token_ids[:cut]) == whole


def test_only_what_begins_alike_is_run_as_one() -> None:
    """A prompt and a chat of the same tokens: stop strings may end them elsewhere."""
    chat = Request(id=RequestId("a", 1), prompt_token_ids=(5,), sampling=closing(), begins="reasoning")
    assert identity(chat) != identity(replace(chat, begins="answer"))
    assert identity(chat) == identity(replace(chat, id=RequestId("b", 1)))


def finished(
    engine: Engine, prompt: tuple[int, ...], sampling: SamplingParams, made: tuple[int, ...]
) -> Output:
    generated = (Generated(token_ids=made),) if made else ()
    request = Request(
        id=RequestId("a", 1),
        prompt_token_ids=prompt,
        sampling=sampling,
        generated=generated,
        begins="reasoning",
    )
    engine.add(request)
    while True:
        for completion in engine.step():
            assert completion.error is None, completion.error
            return completion.outputs[0]


def test_a_parser_whose_marks_are_missing_is_refused_before_weights_are_read(folder: Path) -> None:
    with pytest.raises(InvalidParameter, match="harmony needs the tokens") as caught:
        loaded(folder, reasoning_parser="harmony")
    assert caught.value.param == "reasoning_parser"
    whole = loaded(folder, reasoning_parser="none").chat(CHAT, closing(), use_tqdm=False)
    assert whole[0].outputs[0].reasoning is None


def allowed(matcher: Matcher, token_ids: list[int]) -> set[int]:
    """The tokens that its next mask lets through."""
    masks = np.zeros((1, matcher.num_words), dtype=np.int32)
    fill([(matcher, token_ids, 0)], masks)
    return set(np.flatnonzero(np.unpackbits(masks.view(np.uint8), bitorder="little")).tolist())


@pytest.mark.parametrize(
    ("marks", "reasoning", "behind"),
    [
        (THINK, "<think>xyz", "</think>"),
        (THINK, "<think>", "</think>\n"),
        (
            HARMONY,
            "<|channel|>analysis<|message|>xyz<|end|>",
            "<|start|>assistant<|channel|>final<|message|>",
        ),
        (HARMONY, "<|channel|>", "final<|message|>"),
        (HARMONY, "", "<|message|>"),
    ],
)
def test_masks_of_a_sample_that_may_reason(marks: tuple[str, ...], reasoning: str, behind: str) -> None:
    """Undecided: the form's tokens and the marks; in a reasoning: all but the end; behind it: the form's."""
    tokenizer = tokenizer_of(marks, special=marks is HARMONY)
    form = format_of(tokenizer, "auto")
    assert form is not None
    end = tokenizer.id_of("</s>") or 0
    grammars = Grammars(tokenizer, tokenizer.vocab_size, (end,), form)
    params = StructuredOutputsParams(regex="[a-c]{3,9}")
    (plain,), (free,) = grammars.matchers(params, [()]), grammars.matchers(params, [()], "undecided")
    first = allowed(plain, [])
    assert first.isdisjoint({end, *form.openers})
    assert allowed(free, []) == first | set(form.openers)
    made = ids_of(tokenizer, reasoning)
    if made:
        assert set(range(tokenizer.vocab_size)) - allowed(free, made) == {end}
    made += ids_of(tokenizer, behind)
    assert allowed(free, made) == first
    ids = tokenizer.encode_part("abc")
    assert allowed(free, made + ids) == allowed(plain, ids)
    assert end in allowed(plain, ids)
