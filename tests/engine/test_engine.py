"""The engine on a tiny model: what is refused, what ends a request, and that nothing spreads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoint import Checkpoint
from engine.config import EngineConfig
from engine.engine import Engine
from engine.growth import Growth, join
from engine.request import Completion, Rejected, Request, RequestId
from engine.sampling_params import SamplingParams
from engine.step_times import PARTS
from tests.support.tiny import EOS_TOKEN_ID, VOCAB_SIZE, write_tiny_llama

PAGE_SIZE = 16
NUM_PAGES = 10
MAX_MODEL_LEN = 256
NAN_TOKEN = 50


def load(folder: Path, num_pages: int = NUM_PAGES, **settings: Any) -> Engine:
    page_bytes = Checkpoint.open(str(folder)).config.kv_bytes_per_token(4) * PAGE_SIZE
    memory = num_pages * page_bytes
    return Engine.load(EngineConfig(model=str(folder), kv_cache_memory_bytes=memory, threads=1, **settings))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Engine:
    return load(folder, max_model_len=MAX_MODEL_LEN)


@pytest.fixture
def engine(loaded: Engine) -> Iterable[Engine]:
    """One engine for all tests here; each must leave it empty and whole."""
    yield loaded
    assert not loaded.has_work
    assert not loaded.scheduler.has_work
    assert loaded.pool.num_available == NUM_PAGES
    loaded.check()


def request(name: str, prompt: Iterable[int] = (5, 6, 7), **sampling: Any) -> Request:
    params = SamplingParams(**{"temperature": 0.0, "seed": 1, "max_tokens": 8, "ignore_eos": True} | sampling)
    return Request(id=RequestId(name, 1), prompt_token_ids=tuple(prompt), sampling=params)


def finish(engine: Engine) -> dict[str, Completion]:
    done: dict[str, Completion] = {}
    while engine.has_work:
        for completion in engine.step():
            assert completion.id.job_id not in done
            done[completion.id.job_id] = completion
        engine.check()
    return done


def tokens(engine: Engine, **sampling: Any) -> tuple[int, ...]:
    engine.add(request("probe", **sampling))
    return finish(engine)["probe"].outputs[0].token_ids


@pytest.mark.parametrize(
    ("prompt", "sampling", "code", "says"),
    [
        ((), {}, "invalid_request", "empty"),
        ((5, VOCAB_SIZE), {}, "invalid_request", f"0 to {VOCAB_SIZE - 1}"),
        ((5, -1), {}, "invalid_request", "outside"),
        ((5,) * MAX_MODEL_LEN, {}, "context_length_exceeded", f"at most {MAX_MODEL_LEN - 1}"),
        ((5,) * 170, {}, "kv_capacity_exceeded", "160 tokens"),
        ((5,) * 100, {"max_tokens": 62}, "kv_capacity_exceeded", "output of 62 tokens"),
        ((5,) * 250, {"max_tokens": 20, "min_tokens": 7}, "context_length_exceeded", "min_tokens"),
        ((5,), {"seed": None}, "invalid_request", "seed"),
    ],
)
def test_what_cannot_run_is_rejected_before_the_device(
    engine: Engine, prompt: tuple[int, ...], sampling: dict[str, Any], code: str, says: str
) -> None:
    steps = engine.stats()["num_steps"]
    with pytest.raises(Rejected, match=says) as caught:
        engine.add(request("bad", prompt, **sampling))
    assert caught.value.code == code
    assert engine.step() == []
    assert engine.stats()["num_steps"] == steps


def test_an_id_is_in_the_engine_once(engine: Engine) -> None:
    engine.add(request("a"))
    with pytest.raises(Rejected, match="already"):
        engine.add(request("a"))
    assert list(finish(engine)) == ["a"]
    engine.add(request("a"))  # gone, so it may come again
    finish(engine)


def test_what_just_fits_runs(engine: Engine) -> None:
    engine.add(request("pool", (5,) * 100, max_tokens=61))  # 160 slots: the last token needs none
    assert len(finish(engine)["pool"].outputs[0].token_ids) == 61
    engine.add(request("rest of the pool", (5,) * 100, max_tokens=None))
    assert len(finish(engine)["rest of the pool"].outputs[0].token_ids) == 61


def test_the_context_ends_a_request(folder: Path) -> None:
    engine = load(folder, max_model_len=32)
    for number, max_tokens in enumerate([None, 1000]):
        engine.add(request(str(number), (5,) * 20, max_tokens=max_tokens))
    for completion in finish(engine).values():
        assert len(completion.outputs[0].token_ids) == 12
        assert completion.outputs[0].finish_reason == "length"


def test_end_of_sequence(folder: Path, engine: Engine) -> None:
    free = tokens(engine, max_tokens=30)
    ending = free[4]
    first = free.index(ending)
    ends = write_tiny_llama(folder.parent / "ends", eos_token_id=[EOS_TOKEN_ID, ending])
    other = load(ends)
    other.add(request("stops", max_tokens=30, ignore_eos=False))
    other.add(request("goes on", max_tokens=30, ignore_eos=True))
    done = finish(other)
    assert done["stops"].outputs[0].token_ids == free[: first + 1]
    assert done["stops"].outputs[0].finish_reason == "stop"
    assert done["stops"].outputs[0].stop_reason is None
    assert done["goes on"].outputs[0].token_ids == free


def test_stop_tokens_and_min_tokens(engine: Engine) -> None:
    free = tokens(engine, max_tokens=20)
    stop = free[3]
    engine.add(request("stops", max_tokens=20, stop_token_ids=(stop,)))
    engine.add(request("later", max_tokens=20, stop_token_ids=(stop,), min_tokens=10))
    done = finish(engine)
    assert done["stops"].outputs[0].token_ids == free[: free.index(stop) + 1]
    assert done["stops"].outputs[0].stop_reason == stop
    assert stop not in done["later"].outputs[0].token_ids[:10]
    assert len(done["later"].outputs[0].token_ids) >= 10


def test_stop_strings(engine: Engine) -> None:
    assert engine.tokenizer is not None
    free = tokens(engine, max_tokens=20)
    text = engine.tokenizer.decode(free)
    stop = text[6:8]
    at = text.find(stop)
    engine.add(request("stops", max_tokens=20, stop=(stop, "never there")))
    engine.add(request("does not", max_tokens=20, stop=("never there",)))
    done = finish(engine)
    output = done["stops"].outputs[0]
    assert (output.finish_reason, output.stop_reason, output.text_cut) == ("stop", stop, at)
    assert output.token_ids == free[: len(output.token_ids)]
    assert engine.tokenizer.decode(output.token_ids)[: output.text_cut] == text[:at]
    assert stop in engine.tokenizer.decode(output.token_ids)
    assert stop not in engine.tokenizer.decode(output.token_ids[:-1])
    assert done["stops"].num_generated == len(output.token_ids)
    assert done["does not"].outputs[0].token_ids == free
    assert done["does not"].outputs[0].text_cut is None


def test_a_stop_string_wins_over_length_by_the_same_token(engine: Engine) -> None:
    assert engine.tokenizer is not None
    free = tokens(engine, max_tokens=20)
    text = engine.tokenizer.decode(free)
    stop = text[6:8]
    engine.add(request("first", max_tokens=20, stop=(stop,)))
    needed = len(finish(engine)["first"].outputs[0].token_ids)
    engine.add(request("exact", max_tokens=needed, stop=(stop,)))
    assert finish(engine)["exact"].outputs[0].finish_reason == "stop"


def test_stop_strings_need_a_tokenizer(loaded: Engine) -> None:
    engine = Engine(loaded.runner, None, loaded.config)
    with pytest.raises(Rejected, match="stop_token_ids"):
        engine.add(request("a", stop=("x",)))
    assert not engine.has_work


def test_samples_end_one_by_one_and_arrive_together(engine: Engine) -> None:
    engine.add(
        request(
            "n", temperature=1.0, n=5, max_tokens=30, ignore_eos=False, stop_token_ids=tuple(range(3, 40))
        )
    )
    engine.add(
        request(
            "one", temperature=1.0, n=1, max_tokens=30, ignore_eos=False, stop_token_ids=tuple(range(3, 40))
        )
    )
    done = finish(engine)
    outputs = done["n"].outputs
    assert len({output.token_ids for output in outputs}) == 5
    assert len({len(output.token_ids) for output in outputs}) > 1
    assert outputs[0] == done["one"].outputs[0]
    assert done["n"].num_generated == sum(len(output.token_ids) for output in outputs)


def test_abort_frees_everything_at_once(engine: Engine) -> None:
    engine.add(request("a", n=3, temperature=1.0, max_tokens=40))
    engine.add(request("b", max_tokens=8))
    engine.step()
    engine.step()
    gone = engine.abort(RequestId("a", 1))
    assert gone is not None
    assert [len(sample.token_ids) for sample in gone.generated] == [2, 2, 2]
    assert replace(gone, generated=()) == Completion(
        id=RequestId("a", 1), aborted=True, num_prompt=3, num_generated=6
    )
    assert engine.abort(RequestId("a", 1)) is None
    engine.check()
    assert list(finish(engine)) == ["b"]


def test_what_has_grown_makes_a_checkpoint(engine: Engine) -> None:
    """Told of at any moments, it is what the request has made; a resumed request tells of what is new only."""
    asked = request("a", n=2, temperature=1.0, max_tokens=30, logprobs=1, prompt_logprobs=2)
    engine.add(asked)
    engine.add(request("b", max_tokens=3))
    growths: list[Growth] = []
    for step in range(20):
        engine.step()
        if step % 3 == 2:
            growths += engine.grown()
    growths += engine.grown()
    assert engine.grown() == []
    whole = engine.generated(asked.id)
    assert [len(sample.token_ids) for sample in whole] == [20, 20]
    assert join([growth for growth in growths if growth.id == asked.id]) == whole
    (expected,) = [one for one in finish(engine).values() if one.id == asked.id]

    engine.add(replace(asked, generated=whole))
    for _ in range(5):
        engine.step()
    (more,) = engine.grown()
    assert more.starts == (20, 20)
    assert [len(sample.token_ids) for sample in more.generated] == [5, 5]
    (resumed,) = finish(engine).values()
    assert resumed.outputs == expected.outputs


def test_numbers_that_are_not_finite_fail_their_request_alone(tmp_path: Path) -> None:
    engine = load(write_tiny_llama(tmp_path, nan_token_id=NAN_TOKEN))
    expected = tokens(engine, max_tokens=20)
    assert NAN_TOKEN not in expected
    engine.add(request("before", max_tokens=20))
    engine.add(request("nan", (5, NAN_TOKEN, 7), max_tokens=20))
    engine.add(request("nan in a long prompt", (*range(3, 40), NAN_TOKEN), max_tokens=20, n=2))
    engine.add(request("after", max_tokens=20))
    done = finish(engine)
    for name in ("nan", "nan in a long prompt"):
        error = done[name].error
        assert error is not None
        assert error.code == "numerics"
        assert done[name].outputs == ()
    for name in ("before", "after"):
        assert done[name].error is None
        assert done[name].outputs[0].token_ids == expected
    # Ten prompts over all pages, those that held NaN among them.
    for _ in range(2):
        for number in range(5):
            engine.add(request(str(number), max_tokens=20))
        assert {one.outputs[0].token_ids for one in finish(engine).values()} == {expected}
    assert engine.pool.num_available == NUM_PAGES


def test_stats_count(folder: Path) -> None:
    engine = load(folder)
    engine.add(request("a", max_tokens=3))
    engine.add(request("b", max_tokens=5))
    assert engine.progress() == {}
    assert engine.request_ids == [RequestId("a", 1), RequestId("b", 1)]
    assert engine.num_requests == 2
    assert RequestId("a", 1) in engine
    engine.step()
    assert engine.progress() == {RequestId("a", 1): 1, RequestId("b", 1): 1}
    stats = engine.stats()
    assert (stats["num_running"], stats["num_waiting"], stats["num_free_pages"]) == (2, 0, NUM_PAGES - 2)
    finish(engine)
    stats = engine.stats()
    busy = stats.pop("busy_seconds")
    assert busy > 0
    assert sum(stats.pop(f"{part}_seconds") for part in PARTS) == pytest.approx(busy)
    assert stats == {
        "num_requests": 0,
        "num_running": 0,
        "num_waiting": 0,
        "num_compiling": 0,
        "num_steps": 5,
        "num_prompt_tokens": 6,
        "num_cached_tokens": 0,  # their common prompt of 3 tokens is too short to be worth a copy
        "num_generated_tokens": 8,
        "num_computed_tokens": 6 + 2 + 4,  # the last token of each is never computed
        "num_draft_tokens": 0,
        "num_accepted_tokens": 0,
        "num_recomputed_tokens": 0,
        "num_finished": 2,
        "num_preemptions": 0,
        "num_pages": NUM_PAGES,
        "num_free_pages": NUM_PAGES - 1,
        "num_cached_pages": 1,  # their common prompt
        "num_swapped_out_pages": 0,
        "num_swapped_in_pages": 0,
    }
