"""Any history of adding, stepping, aborting, preempting, squeezing and resuming keeps the invariants, and every
request gets the tokens, and the logprobs of its prompt, that it would get alone. No torch: `CheckedRunner` holds what
was computed in every slot.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from engine.request import Completion, Request, RequestId
from engine.sampling_params import SamplingParams
from tests.support.checked import checked_engine, expected, expected_scores
from tests.support.pressure import expect_short_answers

PAGE_SIZE = 8
TEMPLATES = [tuple(range(100 * k, 100 * k + length)) for k, length in enumerate((5, 8, 13, 16, 22, 46), 1)]

prompts = st.builds(
    lambda template, own: template + tuple(own),
    st.sampled_from([(), *TEMPLATES]),
    st.lists(st.integers(3, 4), min_size=1, max_size=20),
)


class AnyHistory(RuleBasedStateMachine):
    requests = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.count = itertools.count()
        self.live: dict[RequestId, Request] = {}

    @rule(
        target=requests,
        prompt=prompts,
        max_tokens=st.integers(1, 40),
        n=st.sampled_from([1, 1, 1, 3]),
        prompt_logprobs=st.sampled_from([None, None, 0]),
        temperature=st.sampled_from([0.0, 1.0]),
        seed=st.integers(0, 2),
        salt=st.sampled_from(["", "", "other"]),
        priority=st.sampled_from([0, 0, 0, -1, 1]),
        turn=st.sampled_from([None, None, 100.0, 200.0]),
        ignore_eos=st.booleans(),
    )
    def add(self, **asked: Any) -> RequestId:
        sampling = SamplingParams(
            **{name: asked[name] for name in ("max_tokens", "n", "temperature", "seed", "prompt_logprobs")}
        )
        request = Request(
            id=RequestId(f"job-{next(self.count)}", 1),
            prompt_token_ids=asked["prompt"],
            sampling=replace(sampling, ignore_eos=asked["ignore_eos"]),
            cache_salt=asked["salt"],
            priority=asked["priority"],
            turn=asked["turn"],
        )
        self._add(request)
        return request.id

    def _add(self, request: Request) -> None:
        self.engine.add(request)
        self.live[request.id] = request

    @rule(times=st.integers(1, 6), optimistic=st.booleans())
    def step(self, times: int, optimistic: bool) -> None:
        for _ in range(times):
            if optimistic:
                expect_short_answers(self.engine.scheduler)
            for completion in self.engine.step():
                self._ended(completion)
            self.engine.check()

    @rule(request_id=requests)
    def abort(self, request_id: RequestId) -> None:
        completion = self.engine.abort(request_id)
        assert (completion is not None) == (request_id in self.live)
        if completion is not None:
            assert completion.aborted
            del self.live[request_id]

    @rule(request_id=requests)
    def resume(self, request_id: RequestId) -> None:
        """It leaves with a checkpoint and comes back as another claim of the same job."""
        if request_id in self.live:
            request = self.live.pop(request_id)
            generated = self.engine.generated(request_id)
            self.engine.abort(request_id)
            again = RequestId(request_id.job_id, request_id.fence + 1)
            self._add(replace(request, id=again, generated=generated))

    @rule(number=st.integers(0, 100))
    def preempt(self, number: int) -> None:
        running = self.engine.scheduler.running
        if running:
            self.engine.scheduler.preempt(running[number % len(running)])

    @rule(count=st.integers(1, 30))
    def squeeze(self, count: int) -> None:
        """Somebody needs pages for a moment: what is cached is evicted, to host memory where there is any."""
        pool = self.engine.pool
        pool.free(pool.allocate(min(count, pool.num_available)) or [])

    @invariant()
    def whole(self) -> None:
        self.engine.check()

    def teardown(self) -> None:
        while self.engine.has_work:
            for completion in self.engine.step():
                self._ended(completion)
            self.engine.check()
        assert not self.live
        assert self.engine.pool.num_available == self.engine.pool.num_pages

    def _ended(self, completion: Completion) -> None:
        request = self.live.pop(completion.id)
        assert completion.error is None
        for index, output in enumerate(completion.outputs):
            assert output.token_ids == expected(
                request, index, request.sampling.max_tokens or 0, self.engine.runner.vocab_size
            )
        assert len(completion.outputs) == request.sampling.n
        assert completion.prompt_logprobs == expected_scores(request)


def machine(num_pages: int, **settings: Any) -> Any:
    class Machine(AnyHistory):
        def __init__(self) -> None:
            super().__init__()
            self.engine = checked_engine(num_pages, PAGE_SIZE, **settings)

    Machine.TestCase.settings = PROFILE
    return Machine.TestCase


PROFILE = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)

TestSmallPool = machine(16, max_num_seqs=4, max_num_batched_tokens=16)
TestWithHostMemory = machine(
    14, num_host_pages=9, max_num_seqs=6, max_num_batched_tokens=64, preemption_mode="swap"
)
TestLargePool = machine(200, num_host_pages=40, max_num_seqs=8, max_num_batched_tokens=7)
TestWithoutPrefixCaching = machine(
    16, num_host_pages=10, max_num_seqs=4, max_num_batched_tokens=32, enable_prefix_caching=False
)
TestFirstComeFirstServed = machine(16, max_num_seqs=4, max_num_batched_tokens=32, scheduling_policy="fcfs")
TestSeveralSteps = machine(24, num_host_pages=9, max_num_seqs=4, max_num_batched_tokens=32, steps=8)
TestSpeculation = machine(
    24, num_host_pages=9, max_num_seqs=4, max_num_batched_tokens=16, speculative_tokens=7, vocab_size=5
)
TestSpeculationBesideSeveralSteps = machine(
    200, max_num_seqs=8, max_num_batched_tokens=64, steps=4, speculative_tokens=5, vocab_size=5
)
TestManySteps = machine(200, max_num_seqs=8, max_num_batched_tokens=64, steps=16)
