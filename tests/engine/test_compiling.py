"""Compiling grammars: whoever waits for one waits alone, and what cannot be had, or not in time, is an answer."""

from __future__ import annotations

import cProfile
import json
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from engine import LLM, SamplingParams, StructuredOutputsParams
from engine.compiling import Compiling
from engine.engine import Engine
from engine.grammar_source import complaint
from engine.grammars import Grammars
from engine.matcher import Matcher, fill
from engine.request import Completion, RequestId
from engine.run import Run
from engine.sequence import Sequence
from tests.support.grammars import HOSTILE, left_whole, params, request, run, text_of, tiny_llm
from tests.support.tiny import EOS_TOKEN_ID, VOCAB_SIZE


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return tiny_llm(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def engine(llm: LLM) -> Iterator[Engine]:
    yield from left_whole(llm)


# --- hostile grammars ---------------------------------------------------------------------------------------


def test_hostile_grammars_harm_nobody(engine: Engine) -> None:
    """All at once. They are refused, or fail, or run, and somebody else's tokens are made while they compile."""
    wishes = {name: StructuredOutputsParams(**{kind: source}) for name, (kind, source) in HOSTILE.items()}
    engine.add(request("other", SamplingParams(seed=1, max_tokens=200, ignore_eos=True)))
    engine.step()
    for name, wish in wishes.items():
        engine.add(request(name, SamplingParams(seed=1, max_tokens=12, structured_outputs=wish)))
    done: dict[str, Completion] = {}
    made_meanwhile = 0
    while engine.has_work:
        made = engine.progress().get(RequestId("other", 1), 200)
        done |= {one.id.job_id: one for one in engine.step()}
        if engine.stats()["num_compiling"]:
            made_meanwhile += engine.progress().get(RequestId("other", 1), 200) - made
        engine.check()
    assert made_meanwhile > 3
    assert len(done.pop("other").outputs[0].token_ids) == 200
    assert done.keys() == wishes.keys()
    errors = {name: one.error for name, one in done.items() if one.error is not None}
    assert {error.code for error in errors.values()} == {"invalid_request", "grammar_error"}
    for name, error in errors.items():
        wanted = wishes[name].param if error.code == "invalid_request" else "structured_outputs"
        assert error.message.startswith(f"{wanted}: ")
        assert len(error.message) < 400
    told_at_the_door = {name for name, wish in wishes.items() if complaint(wish) is not None}
    assert told_at_the_door <= {name for name, error in errors.items() if error.code == "invalid_request"}
    assert {"look-ahead", "a remote reference", "nullable rules"} <= told_at_the_door
    assert {"look-ahead", "a remote reference", "deep parentheses", "deep GBNF"} <= errors.keys()
    assert {"nested quantifiers", "far look-back", "doubling references"} <= done.keys() - errors.keys()


def test_a_limit_that_is_met_in_a_step_fails_that_request_alone(engine: Engine) -> None:
    hidden = params(regex=HOSTILE["hidden repeats of repeats"][1])
    done = run(engine, request("bad", hidden), request("good", params(regex="[a-z]{30}")))
    assert done["bad"].error is not None
    assert done["bad"].error.code == "grammar_error"
    assert "too many expressions" in done["bad"].error.message
    assert re.fullmatch("[a-z]{30}", text_of(engine, done["good"]))


def test_what_others_used_up_is_not_held_against_a_sample(engine: Engine) -> None:
    """Samples share what a grammar has built so far. When that is full, each goes on with its own."""
    assert engine.tokenizer is not None
    wish = StructuredOutputsParams(regex="x(a{1000}){1000}|c{60}")  # one way is too much, the other is short
    towards_c = dict.fromkeys(engine.tokenizer.encode_part("c"), 100.0)
    engine.add(
        request("c", SamplingParams(seed=1, max_tokens=99, logit_bias=towards_c, structured_outputs=wish))
    )
    while engine.stats()["num_compiling"]:
        engine.step()
    grammars = compiling(engine)._grammars
    grammar = grammars._cached[wish]
    greedy = grammar.shared()
    for letter in "xaaaa":
        greedy.consume_tokens(engine.tokenizer.encode_part(letter))
        greedy.compute_bitmask()
    assert greedy.is_error()
    late, mask = Matcher(grammar), np.zeros((1, grammar.num_words), dtype=np.int32)
    fill([(late, [], 0)], mask)
    assert not late.error
    allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
    assert sorted(map(engine.tokenizer.token_bytes, allowed.tolist())) == [b"c", b"x"]
    done = run(engine)
    assert text_of(engine, done["c"]) == "c" * 60
    assert grammar.spoiled
    run(engine, request("next", SamplingParams(seed=1, max_tokens=2, structured_outputs=wish)))
    assert grammars._cached[wish] is not grammar


# --- waiting for a compile ----------------------------------------------------------------------------------


def compiling(engine: Engine) -> Compiling:
    assert engine._compiling is not None
    return engine._compiling


def test_whoever_is_aborted_while_it_compiles_is_gone(engine: Engine) -> None:
    sampling = params(regex="q{5}")
    engine.add(request("a", sampling))
    engine.add(request("b", sampling))  # the same run
    assert engine.has_work
    assert engine.stats()["num_compiling"] == 1
    engine.check()
    assert engine.abort(RequestId("a", 1)) is not None
    assert engine.stats()["num_compiling"] == 1
    answer = engine.abort(RequestId("b", 1))
    assert answer is not None
    assert answer.aborted
    assert answer.num_generated == 0
    assert engine.step() == []


def test_a_step_with_nothing_else_to_do_waits_for_the_compile(engine: Engine) -> None:
    """Few steps, however long it takes: one that waits out its time, or finds it done, computes nothing."""
    engine.add(request("slow", params(json=json.loads(HOSTILE["a product of unions"][1]))))
    steps = 0
    while engine.has_work:
        engine.step()
        steps += 1
        assert steps < 1000
    assert engine.stats()["num_compiling"] == 0


def test_a_compile_that_takes_too_long_is_given_up(llm: LLM) -> None:
    assert llm.engine.tokenizer is not None
    engine = Engine(llm.engine.runner, llm.engine.tokenizer, llm.engine.config)
    engine._compiling = Compiling(
        Grammars(llm.engine.tokenizer, VOCAB_SIZE, (EOS_TOKEN_ID,)), budget_seconds=0
    )
    done = run(engine, request("late", params(json=json.loads(HOSTILE["a product of unions"][1]))))
    assert done["late"].error is not None
    assert done["late"].error.message == "structured_outputs.json: takes longer to compile than 0 s"


def test_a_fault_while_compiling_is_an_answer(llm: LLM) -> None:
    """Whatever comes out of the library, the engine goes on."""

    class Broken(Grammars):
        def matchers(self, *_: Any) -> Any:
            raise BaseException("panicked")

    assert llm.engine.tokenizer is not None
    engine = Engine(llm.engine.runner, llm.engine.tokenizer, llm.engine.config)
    engine._compiling = Compiling(Broken(llm.engine.tokenizer, VOCAB_SIZE, (EOS_TOKEN_ID,)))
    done = run(engine, request("a", params(regex="a")))
    assert done["a"].error is not None
    assert done["a"].error.message == "structured_outputs: cannot be compiled: panicked"
    assert not engine.has_work


def test_a_step_looks_at_those_that_are_done_and_not_at_all_that_wait(llm: LLM) -> None:
    """A hundred thousand may wait for theirs; each was asked at every step."""
    go_on = threading.Event()

    class Slow(Grammars):
        def matchers(self, *asked: Any) -> Any:
            go_on.wait()
            return super().matchers(*asked)

    assert llm.engine.tokenizer is not None
    waiting = Compiling(Slow(llm.engine.tokenizer, VOCAB_SIZE, (EOS_TOKEN_ID,)))
    runs = []
    for number in range(300):
        asks = request(str(number), params(regex="a"))
        runs.append(Run(asks, [Sequence(asks, 0, 1)], []))
        waiting.add(runs[-1], runs[-1].sequences)

    def calls(work: Callable[[], object]) -> int:
        profile = cProfile.Profile()
        profile.runcall(work)
        return sum(entry.callcount for entry in profile.getstats())

    try:
        asked = calls(waiting.take) + calls(lambda: waiting.wait(0.001))
        assert len(waiting) == 300
        waiting.remove(runs[299])
    finally:
        go_on.set()
    assert asked < 200
    done: list[Run] = []
    while len(done) < 299:
        waiting.wait(10)
        done += (compiled.run for compiled in waiting.take())
    assert set(done) == set(runs[:299])
    assert len(waiting) == 0
    assert all(run.sequences[0].matcher is not None for run in done)
