"""Shared prefixes, samples, twins, learned admission and overload, counted: what is computed once stays computed."""

from __future__ import annotations

import gc
import random
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.engine import Engine
from engine.request import Completion, Generated, Request, RequestId
from engine.runner import ModelRunner
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from tests.support.checked import CheckedRunner, checked_engine, expected
from tests.support.pressure import run
from tests.support.tiny import write_tiny_llama

PAGE_SIZE = 16


def request(name: str, prompt: tuple[int, ...], **asked: Any) -> Request:
    outside = {key: asked.pop(key) for key in ("cache_salt", "priority", "turn") if key in asked}
    sampling = SamplingParams(
        **{"seed": zlib.crc32(name.encode()), "max_tokens": 8, "ignore_eos": True} | asked
    )
    return Request(id=RequestId(name, 1), prompt_token_ids=prompt, sampling=sampling, **outside)


def prompt(seed: int, length: int) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(3, 1000) for _ in range(length))


def finish(engine: Engine, requests: list[Request]) -> dict[str, Completion]:
    return {key.job_id: one for key, one in run(engine, requests, poison=False).items()}


@pytest.mark.parametrize("policy", ["planned", "fcfs"])
def test_a_cold_prefix_is_computed_once_for_96_requests(policy: str) -> None:
    prefix, rng = prompt(1, 512), random.Random(2)
    requests = [
        request(f"{k}", prefix + prompt(100 + k, rng.randint(16, 64)), max_tokens=rng.randint(32, 128))
        for k in range(96)
    ]
    engine = checked_engine(2000, PAGE_SIZE, scheduling_policy=policy)
    done = finish(engine, requests)
    shareable = 95 * 512
    found = sum(one.num_cached_tokens for one in done.values())
    assert found >= 0.95 * 96 * 512
    assert found >= shareable
    assert sum(one.num_cached_tokens == 0 for one in done.values()) == 1
    own = sum(len(one.prompt_token_ids) - 512 for one in requests)
    made = sum(one.num_generated for one in done.values())
    assert engine.stats()["num_computed_tokens"] <= 512 + own + made - 96


@pytest.mark.parametrize("length", [100, 96, 97])
def test_eight_samples_share_their_prompt_but_for_one_page_each(length: int) -> None:
    engine = checked_engine(200, PAGE_SIZE)
    whole = engine.pool.pages_for(length)
    engine.add(request("n", prompt(3, length), n=8, temperature=1.0, max_tokens=4))
    most = 0
    while engine.has_work:
        engine.step()
        engine.check()
        most = max(most, engine.pool.num_owned)
    # the prompt once, and for each further sample one page to write into, until 4 tokens fill another one
    assert most <= whole + 7 + (8 if length % PAGE_SIZE + 4 > PAGE_SIZE or length % PAGE_SIZE == 0 else 0)


def test_twins_run_once_and_each_gets_its_own_answer() -> None:
    engine = checked_engine(100, PAGE_SIZE)
    asked = {"temperature": 1.0, "seed": 5, "max_tokens": 10}
    requests = [request(f"twin {k}", prompt(4, 40), **asked) for k in range(5)]
    requests.append(request("other seed", prompt(4, 40), **asked | {"seed": 6}))
    requests.append(request("other tenant", prompt(4, 40), **asked, cache_salt="other"))
    done = finish(engine, requests)
    assert engine.stats()["num_generated_tokens"] == 30
    assert len({done[f"twin {k}"].outputs for k in range(5)}) == 1
    assert all(done[f"twin {k}"].num_generated == 10 for k in range(5))
    assert [done[f"twin {k}"].num_cached_tokens for k in range(5)] == [0, 40, 40, 40, 40]
    assert done["other seed"].outputs != done["twin 0"].outputs
    assert done["other tenant"].num_cached_tokens == 0


def test_a_twin_outlives_the_one_that_came_first() -> None:
    engine = checked_engine(100, PAGE_SIZE)
    first, second = (request(name, prompt(5, 40), seed=1, max_tokens=6) for name in ("first", "second"))
    engine.add(first)
    engine.step()
    engine.add(second)
    gone = engine.abort(first.id)
    assert gone is not None
    assert gone.aborted
    engine.check()
    engine.add(first)  # and comes again, while the run goes on
    done = finish(engine, [])
    assert set(done) == {"first", "second"}
    assert done["second"].outputs[0].token_ids == expected(second, 0, 6)


def test_a_twin_that_is_aborted_counts_as_its_completion_says() -> None:
    engine = checked_engine(100, PAGE_SIZE)
    first, second = (request(name, prompt(5, 40), seed=1, max_tokens=6) for name in ("first", "second"))
    engine.add(first)
    engine.add(second)
    gone = engine.abort(second.id)
    assert gone is not None
    finish(engine, [])
    stats = engine.stats()
    assert (stats["num_finished"], stats["num_cached_tokens"]) == (2, gone.num_cached_tokens) == (2, 40)


def test_one_that_was_at_its_end_and_is_aborted_leaves_nothing_behind() -> None:
    """No step need follow: as far as anybody can see there is no work."""
    engine = checked_engine(100, PAGE_SIZE)
    whole = request("whole", prompt(5, 40), seed=1, max_tokens=2)
    whole = replace(whole, generated=(Generated(token_ids=expected(whole, 0, 2)),))
    engine.add(whole)
    engine.abort(whole.id)
    assert not engine.has_work
    gc.collect()
    assert not [one for one in gc.get_referrers(whole) if isinstance(one, Sequence)]


def test_a_twin_in_a_hurry_does_not_wait() -> None:
    engine = checked_engine(100, PAGE_SIZE, max_num_seqs=1)
    engine.add(request("long", prompt(6, 5), max_tokens=50))
    engine.step()
    engine.add(request("slow", prompt(7, 5), seed=1))
    engine.add(request("fast", prompt(7, 5), seed=1, priority=-1))
    order: list[str] = []
    while engine.has_work:
        order += [one.id.job_id for one in engine.step()]
    assert order == ["fast", "long", "slow"]


def test_higher_priority_preempts_and_lower_turns_go_first() -> None:
    engine = checked_engine(100, PAGE_SIZE, max_num_seqs=2)
    for name in "ab":
        engine.add(request(name, prompt(ord(name), 20), max_tokens=60))
    for _ in range(10):
        engine.step()
    engine.add(request("later", prompt(8, 20), turn=10_000.0))
    engine.add(request("sooner", prompt(9, 20), turn=100.0))
    engine.add(request("urgent", prompt(10, 20), priority=-5))
    order: list[str] = []
    while engine.has_work:
        order += [one.id.job_id for one in engine.step()]
        engine.check()
    assert order[0] == "urgent"
    assert order.index("sooner") < order.index("later")
    assert engine.stats()["num_preemptions"] == 1


@pytest.mark.long
def test_overload_wastes_next_to_nothing() -> None:
    """2,000 requests, of which about 20 fit at a time, with answers far shorter than max_tokens says."""
    rng = random.Random(12)
    requests = [
        request(
            f"{k}", prompt(1000 + k, rng.randint(10, 60)), max_tokens=200, ignore_eos=False, min_tokens=30
        )
        for k in range(2000)
    ]
    engine = checked_engine(20 * 6, PAGE_SIZE)
    for one in requests:
        engine.add(one)
    done = 0
    while engine.has_work:
        done += len(engine.step())
    engine.check()
    stats = engine.stats()
    assert done == 2000
    assert stats["num_recomputed_tokens"] <= 0.05 * stats["num_generated_tokens"]
    # and it is not for fear: at least 14 run on average
    assert stats["num_generated_tokens"] / stats["num_steps"] > 14
    assert engine.pool.num_available == engine.pool.num_pages


def test_a_template_teaches_lengths_by_its_prefix() -> None:
    engine = checked_engine(400, PAGE_SIZE)
    short, long = prompt(20, 64), prompt(21, 64)
    for k in range(6):
        engine.add(request(f"s{k}", short + prompt(k, 9), max_tokens=5, ignore_eos=True, stop_token_ids=(1,)))
    finish(engine, [])
    lengths, cache = engine.scheduler.expectations.lengths, engine.scheduler.cache
    engine.add(request("probe", short + prompt(77, 9), max_tokens=300, stop_token_ids=(1,)))
    probe = next(iter(engine.scheduler.waiting))
    assert (
        lengths.expected(cache.names.chain(probe, 64), 300) == 300
    )  # they were cut: who knows how long they are
    for k in range(6):
        lengths.observe(cache.names.chain(probe, 64), 40 + k, cut=False)
    for _ in range(70):
        lengths.observe([], 200, cut=False)
    assert 40 <= lengths.expected(cache.names.chain(probe, 64), 300) < 200
    engine.abort(probe.request.id)
    engine.add(request("other", long, max_tokens=300, stop_token_ids=(1,)))
    other = next(iter(engine.scheduler.waiting))
    assert lengths.expected(cache.names.chain(other, 64), 300) == 200
    engine.abort(other.request.id)


def test_a_broken_page_is_found() -> None:
    engine = checked_engine(20, PAGE_SIZE)
    engine.add(request("a", prompt(30, 40)))
    engine.step()
    engine.check()
    engine.pool.free([engine.scheduler.running[0].pages[0]])
    with pytest.raises(AssertionError, match="page"):
        engine.check()


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_a_hundred_thousand_requests_leak_nothing(tmp_path: Path) -> None:
    from engine.config import EngineConfig

    folder = write_tiny_llama(tmp_path, hidden_size=16, intermediate_size=16, num_layers=1, num_heads=2)
    config = EngineConfig(
        model=str(folder), kv_cache_memory_bytes=400 * 16 * 256, swap_space_bytes=50 * 16 * 256, threads=1
    )
    engine = Engine.load(config)
    rng = random.Random(31)
    templates = [tuple(rng.randrange(3, 320) for _ in range(length)) for length in (8, 16, 40, 64)]
    added = ended = step = 0
    live: set[RequestId] = set()
    while ended < 100_000:
        while added < 100_000 and len(live) < 600:
            own = tuple(rng.randrange(3, 320) for _ in range(rng.randint(1, 12)))
            one = request(
                f"{added}",
                rng.choice(templates) + own,
                max_tokens=rng.randint(1, 8),
                n=rng.choice([1, 1, 1, 2]),
                temperature=rng.choice([0.0, 1.0]),
                ignore_eos=False,
            )
            engine.add(one)
            live.add(one.id)
            added += 1
        if rng.random() < 0.3 and live:
            gone = next(iter(live))
            engine.abort(gone)
            live.remove(gone)
            ended += 1
        for completion in engine.step():
            live.remove(completion.id)
            ended += 1
        step += 1
        if step % 50 == 0:
            engine.check()
    engine.check()
    assert not engine.has_work
    assert engine.pool.num_available == engine.pool.num_pages


def test_the_checked_runner_sees_a_wrong_page() -> None:
    """The yardstick itself: a page that is not this sequence's raises."""
    engine = checked_engine(20, PAGE_SIZE)
    assert isinstance(engine.runner, CheckedRunner)
    engine.add(request("a", prompt(40, 40)))
    engine.step()
    pages = engine.scheduler.running[0].pages
    pages[0], pages[1] = pages[1], pages[0]
    with pytest.raises(AssertionError, match="not what was computed"):
        engine.step()


def test_what_a_preempted_sequence_finds_again_is_no_hit() -> None:
    """They are its own tokens: nobody had computed them before it came."""
    engine = checked_engine(100, PAGE_SIZE)
    engine.add(request("a", prompt(4, 40), max_tokens=6))
    engine.step()
    engine.scheduler.preempt(engine.scheduler.running[0])
    assert finish(engine, [])["a"].num_cached_tokens == 0
    stats = engine.stats()
    assert (stats["num_recomputed_tokens"], stats["num_computed_tokens"]) == (0, 40 + 5)


def test_who_brings_a_checkpoint_is_nobodys_twin() -> None:
    """It goes on from its own tokens, and another one of the same words from none."""
    engine = checked_engine(100, PAGE_SIZE)
    first = request("first", prompt(5, 40), seed=1, max_tokens=6)
    engine.add(first)
    engine.step()
    made = engine.generated(first.id)
    assert [len(one.token_ids) for one in made] == [1]
    second = replace(first, id=RequestId("second", 2), generated=made)
    engine.add(second)
    assert engine.scheduler.num_waiting == 1
    done = finish(engine, [])
    assert {done[name].outputs[0].token_ids for name in ("first", "second")} == {expected(first, 0, 6)}


def test_what_one_that_failed_has_computed_is_found_by_nobody(tmp_path: Path) -> None:
    """A page that went bad, as of a faulty device, fails who has it, and not all that begin like it from then on."""
    config = EngineConfig(
        model=str(write_tiny_llama(tmp_path)), device="cpu", dtype="float32", page_size=16, threads=1
    )
    first, second, third = (
        Request(
            id=RequestId(name, 1),
            prompt_token_ids=tuple(range(3, 60)),
            sampling=SamplingParams(temperature=1.0, seed=number, max_tokens=20, ignore_eos=True),
        )
        for number, name in enumerate(("first", "second", "third"))
    )
    sound = Engine.load(config)
    wanted = run(sound, [second], poison=False)[second.id].outputs
    engine = Engine.load(config)
    engine.add(first)
    for _ in range(3):
        assert engine.step() == []
    assert isinstance(engine.runner, ModelRunner)
    engine.runner.cache.poison(engine.scheduler.running[0].pages[1:2])
    done = run(engine, [], poison=False)[first.id]
    assert done.error is not None
    assert done.error.code == "numerics"
    assert run(engine, [second], poison=False)[second.id].outputs == wanted
    done = run(engine, [third], poison=False)[third.id]
    assert done.error is None
    assert done.num_cached_tokens > 0, "what is sound is shared"
