"""Scheduler: who computes how many tokens in the next step, and what a step's tokens mean.

Keep this small: it is the heart, and every feature would like to live here. There are no phases. A sequence
has tokens and some of them are computed; each step hands out one budget of tokens, running sequences first in
order of admission, then waiting ones in the order of their queue, until budget, places or pages run out. Priority
goes before all of that: whoever waits comes before the running ones of lower priority (of equal: `making_way`). A
chunk of a prompt, a decoded token, a checkpoint and a recompute after preemption are the same catching up.

A sequence is admitted when the pages for all the tokens it has now can be had, and when the forecast says that
everybody can then grow to the expected length. Expectations err; when pages run out all the same, the running
sequence of the lowest priority with the least computed tokens loses its pages and goes back to the front of the
queue. What it has computed stays in the cache, tail first in line for eviction. Two rules keep it from thrashing
and from standing still: nobody comes in at a step that had to throw somebody out, and of the highest priority
the one with the most computed tokens is never a victim while there is another, so something always ends.

Owns the running sequences and the pages' comings and goings. The order of the queue is `waiting`'s, contents of
pages are `prefix_cache`'s, what sequences will need is `expectations`'. Knows no text (stop strings are the
engine's), no tensors, no clock. Chunked prefill after Sarathi (Agrawal et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from itertools import groupby
from types import MappingProxyType

from engine.endings import ending, goes_on
from engine.expectations import Expectations
from engine.making_way import makes_way, victim
from engine.multi_step import MultiStep
from engine.pages import PagePool, require
from engine.plan import Draft, Plan, PromptScores, Row
from engine.prefix_cache import Match, PrefixCache
from engine.request import Output, TokenLogprobs
from engine.sequence import Sequence
from engine.speculation import Speculation
from engine.waiting import Policy, WaitingQueue
from engine.warming import Warming

RETRY_PLANS = 16  # how long a full engine does not ask again whether the next one fits, unless somebody left
MARGIN = 0.02  # of the pages, for expectations that were too low
ROUND = 4  # of the places in the engine: what a worker holds at most (`jobs.claimer`), planned together


class Scheduler:
    """`eos_token_ids` end a sequence unless its request ignores them. `num_host_pages`: where evicted contents
    go, as long as `keeps()` says so. `most_steps`: that a plan may take in one go. `num_speculative_tokens`: that are
    proposed for a sequence, at most."""

    def __init__(
        self,
        pool: PagePool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        eos_token_ids: Collection[int] = (),
        prefix_caching: bool = True,
        policy: Policy = "planned",
        num_host_pages: int = 0,
        most_steps: int = 1,
        num_speculative_tokens: int = 0,
        keeps: Callable[[], bool] = lambda: True,
    ) -> None:
        if max_num_seqs < 1 or max_num_batched_tokens < 1:
            raise ValueError("max_num_seqs and max_num_batched_tokens must be at least 1")
        self.pool = pool
        self.cache = PrefixCache(pool, enabled=prefix_caching, num_host_pages=num_host_pages, keeps=keeps)
        self.names = self.cache.names
        self.expectations = Expectations(pool, self.names)
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.eos_token_ids = frozenset(eos_token_ids)
        self.running: list[Sequence] = []
        self.waiting = WaitingQueue(policy, round_size=ROUND * max_num_seqs)
        self.warming = Warming()
        self.multi_step = MultiStep(pool, most_steps, self._reserve)
        self.speculation = Speculation(num_speculative_tokens, self._reserve)
        self.num_preemptions = 0
        self.num_recomputed = 0  # tokens that had been computed before a preemption
        self._num_plans = 0
        self._retry_at = 0  # the plan that asks again whether somebody can come in

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.num_waiting)

    @property
    def num_waiting(self) -> int:
        return len(self.waiting) + len(self.warming)

    def add(self, sequence: Sequence) -> None:
        """To the queue. Raises ValueError when it could not run even alone: all rests on that."""
        # The last token drawn is never computed, so it needs no slot.
        if self.pool.pages_for(sequence.num_prompt + sequence.max_tokens - 1) > self.pool.num_pages:
            raise ValueError("a sequence that cannot fit into the pool must be rejected before")
        self.waiting.push(sequence, self.names.of_prompt(sequence), self.expectations.length(sequence))
        self._retry_at = 0

    def plan(self) -> Plan:
        """The next step's rows. Empty only when there is no work."""
        self._num_plans += 1
        draft = Draft(self.max_num_batched_tokens)
        preemptions_before = self.num_preemptions
        for priority, equals in groupby(sorted(self.running, key=_priority), key=_priority):
            self._admit(draft, before=priority)
            for sequence in equals:
                if draft.budget == 0:
                    break
                if sequence.pages:  # else preempted a moment ago, for one before it
                    self._go_on(sequence, draft)
        if self.num_preemptions == preemptions_before:
            self._admit(draft)
        if not draft.rows:
            return Plan(())
        num_steps = self.multi_step.together(draft.rows)
        proposed = self.speculation.propose(draft.rows, draft.budget) if num_steps == 1 else {}
        rows = tuple(Row(one, count, proposed.get(one, ())) for one, count in draft.rows.items())
        return Plan(rows, self.cache.take_moves(), num_steps)

    def follow(self, plan: Plan) -> Plan | None:
        """A plan for the same rows behind `plan`, which runs and is not settled; None where that cannot be, or where
        somebody waits who may come in."""
        if self._may_come_in():
            return None
        following = self.multi_step.behind(plan, self.running)
        return following and replace(following, moves=self.cache.take_moves())

    def settle(
        self,
        plan: Plan,
        tokens: list[int],
        logprobs: Mapping[int, TokenLogprobs] | None = None,
        prompt_logprobs: Mapping[int, PromptScores] | None = None,
        further: tuple[list[int], ...] = (),
        further_logprobs: Mapping[int, list[TokenLogprobs]] = MappingProxyType({}),
    ) -> list[Sequence]:
        """Take in a step, as `Draws` has it: `tokens` has one id per sampling row, in order, `logprobs` those that
        were asked for, by number of the sampling row, `prompt_logprobs` by number of the row, `further` what came
        behind `tokens`, with `further_logprobs`: what a sequence drew behind its end is dropped. Returns who left.

        Those carry an `output`; one whose token is -1 or whose `prompt_logprobs` are None (logits that were not
        finite) leaves without.
        """
        drawn = iter(enumerate(tokens))
        finished: list[Sequence] = []
        for place, row in enumerate(plan.rows):
            sequence, samples = row.sequence, row.samples
            self._computed(sequence, row.num_tokens)
            scores = prompt_logprobs.get(place, []) if prompt_logprobs else []
            if scores and sequence.prompt_logprobs is not None:
                sequence.prompt_logprobs += scores
            if not samples:
                if scores is None:  # one that samples has a token -1 as well
                    finished.append(sequence)
                continue
            number, token_id = next(drawn)
            if logprobs and number in logprobs:
                sequence.logprobs += (logprobs[number], *further_logprobs.get(number, ()))
            sound = self._take(sequence, (token_id, *further[number]) if further else (token_id,))
            if row.proposed:
                self.speculation.settle(row, len(further[number]))
            if not sound or sequence.output is not None:
                finished.append(sequence)
            elif sequence.num_generated >= sequence.expected_tokens:
                self.expectations.renew(sequence)
        if finished:
            gone = set(finished)
            self.running = [sequence for sequence in self.running if sequence not in gone]
            for sequence in finished:
                if sequence.output is None:  # what was not finite may lie in its pages: it harms no one else
                    self.cache.discard(sequence)
                self._leave(sequence)
        return finished

    def _take(self, sequence: Sequence, drawn: tuple[int, ...]) -> bool:
        """Append what was drawn, until something ends the sequence; False if that is logits that were not finite.
        All but the last one taken are computed."""
        before, sound = len(sequence.token_ids), True
        if len(drawn) > 1 and goes_on(sequence, drawn, self.eos_token_ids):
            sequence.token_ids += drawn
        else:
            for token_id in drawn:
                sound = token_id >= 0
                if not sound:
                    break
                sequence.token_ids.append(token_id)
                sequence.output = self.ending(sequence, token_id)
                if sequence.output is not None:
                    break
        taken = len(sequence.token_ids) - before
        if taken > 1:
            self._computed(sequence, taken - 1)
        return sound

    def ending(self, sequence: Sequence, token_id: int) -> Output | None:
        """What ended `sequence` with this token, its last, if anything did."""
        return ending(sequence, token_id, self.eos_token_ids)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out at once, wherever it is (aborted, or ended by a stop string), with its pages."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        elif sequence in self.warming:
            self.warming.remove(sequence)
        elif sequence in self.running:
            self.running.remove(sequence)
            self._leave(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """Take the pages of a running sequence and put it back to the front of its level."""
        self.running.remove(sequence)
        self._abandon(sequence)
        self.cache.release(sequence, preempted=True)
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.put_back(sequence)
        self._retry_at = 0

    def check(self) -> None:
        """The invariant of pages, contents and queues; raises AssertionError. After every step in tests, at idle
        in production."""
        self.pool.check(sequence.pages for sequence in self.running)
        self.cache.check()
        self.warming.check(self.running)
        require(len(self.running) + len(self.warming) <= self.max_num_seqs, "too many sequences run")
        live = [*self.running, *self.waiting, *self.warming]
        require(len(set(live)) == len(live), "a sequence is queued twice")
        size = self.pool.page_size
        for sequence in self.running:
            require(sequence.num_computed <= len(sequence.pages) * size, "computed tokens without a page")
            require(sequence.num_pending >= 1, "a running sequence has nothing to compute")
            writes = sequence.pages[sequence.num_computed // size :]
            require(not any(map(self.pool.is_shared, writes)), "a page would have two writers")
        for sequence in (*self.waiting, *self.warming):
            require(not sequence.pages, "a waiting sequence holds pages")
            require(sequence.num_computed == 0, "a waiting sequence has computed tokens")

    # --- coming in ------------------------------------------------------------------------------------------

    def _admit(self, draft: Draft, *, before: float = float("inf")) -> None:
        """Let those in whose priority number is below `before`."""
        forecast = None
        while draft.budget > 0 and self._num_plans >= self._retry_at:
            sequence = self.waiting.peek()
            if sequence is None or _priority(sequence) >= before:
                return
            match = self.cache.match(sequence)
            place = self._has_place()
            if place and self._park(sequence, match):
                continue
            forecast = forecast or self.expectations.forecast(self.running)
            needs = self.expectations.needs(sequence, match)
            limit = self.pool.num_pages * (1 - MARGIN)
            safe = not self.running or forecast.fits(*needs, limit)
            if place and safe and self.cache.acquire(sequence, match, len(sequence.token_ids)):
                self._enter(sequence, draft, match)
                forecast.add(*needs)
                continue
            other = makes_way(self.running, sequence, place=place)
            if other is None:
                self._retry_at = self._num_plans + RETRY_PLANS
                return
            self._put_out(other, draft)
            forecast = None

    def _enter(self, sequence: Sequence, draft: Draft, match: Match) -> None:
        self.waiting.remove(sequence)
        self.running.append(sequence)
        if sequence.high_water == 0:
            sequence.num_cached = min(sequence.num_computed, sequence.num_prompt)
        keys = self.names.of_prompt(sequence)
        self.warming.begin(sequence, keys[sequence.num_computed // self.pool.page_size :])
        draft.give(sequence)

    def _park(self, sequence: Sequence, match: Match) -> bool:
        keys = self.names.chain(sequence, sequence.num_reusable)
        whole = sequence.num_reusable // self.pool.page_size
        if not self.warming.park(sequence, keys[len(match.whole) : whole]):
            return False
        self.waiting.remove(sequence)
        return True

    def _has_place(self) -> bool:
        return len(self.running) + len(self.warming) < self.max_num_seqs

    def _may_come_in(self) -> bool:
        """Whether the first of those who wait has a place, or somebody's, as far as can be said without its pages."""
        first = self.waiting.peek()
        if first is None:
            return False
        return self._has_place() or makes_way(self.running, first, place=False) is not None

    # --- going on -------------------------------------------------------------------------------------------

    def _go_on(self, sequence: Sequence, draft: Draft) -> None:
        needed = sequence.num_computed + min(sequence.num_pending, draft.budget)
        while not self._reserve(sequence, needed):
            last = victim(self.running)
            self._put_out(last, draft)
            if last is sequence:
                return
        draft.give(sequence)

    def _computed(self, sequence: Sequence, num_tokens: int) -> None:
        before, size = sequence.num_computed, self.pool.page_size
        now = sequence.num_computed = before + num_tokens
        self.num_recomputed += max(0, min(sequence.high_water, now) - before)
        sequence.high_water = max(sequence.high_water, now)
        first, last = before // size, now // size
        if last > first:
            self.cache.store(sequence, first, last)
            self._put_back(self.warming.done(sequence.keys[first:last]))
        if before < sequence.num_prompt <= now:
            self.cache.store_tail(sequence, sequence.num_prompt)

    def _reserve(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give `sequence` pages for its first `num_tokens` tokens; False, and nothing taken, if there are too few."""
        missing = self.pool.pages_for(num_tokens) - len(sequence.pages)
        if missing <= 0:
            return True
        pages = self.pool.allocate(missing)
        if pages is None:
            return False
        sequence.pages += pages
        return True

    # --- going out ------------------------------------------------------------------------------------------

    def _leave(self, sequence: Sequence) -> None:
        """It does not run any more and will not come back."""
        self.expectations.learn(sequence)
        self._abandon(sequence)
        self.cache.release(sequence)
        self._retry_at = 0

    def _put_out(self, sequence: Sequence, draft: Draft) -> None:
        draft.take_back(sequence)
        self.preempt(sequence)

    def _abandon(self, sequence: Sequence) -> None:
        keys = self.names.of_prompt(sequence)[sequence.num_computed // self.pool.page_size :]
        self._put_back(self.warming.abandon(sequence, keys))

    def _put_back(self, sequences: list[Sequence]) -> None:
        for sequence in reversed(sequences):
            self.waiting.put_back(sequence)
            self._retry_at = 0


def _priority(sequence: Sequence) -> int:
    return sequence.request.priority
