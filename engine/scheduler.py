"""Scheduler: who computes how many tokens in the next step, and what a step's tokens mean.

Keep this small: it is the heart, and every feature would like to live here. There are no phases. A sequence
has tokens and some of them are computed; each step hands out one budget of tokens, running sequences first in
order of admission, then waiting ones in theirs, until budget, places or pages run out. A chunk of a prompt, a
decoded token and a recompute after preemption are the same catching up. When pages run out, the running
sequence with the least computed tokens loses all of its pages and goes back to the front of the queue.

Two rules keep it from thrashing and from standing still. A sequence is admitted only when pages for all the
tokens it has now are free, so one that was just preempted does not come straight back. And the running
sequence with the most computed tokens is never a victim while there is another, so something always ends.

Owns the two queues and the pages' comings and goings. Knows no text (stop strings are the engine's), no
tensors, no clock. Chunked prefill after Sarathi (Agrawal et al. 2023), preemption by recompute after vLLM.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection

from engine.pages import PagePool
from engine.plan import Plan, Row
from engine.request import Output
from engine.sequence import Sequence


class Scheduler:
    """`eos_token_ids` end a sequence unless its request ignores them."""

    def __init__(
        self,
        pool: PagePool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        eos_token_ids: Collection[int] = (),
    ) -> None:
        if max_num_seqs < 1 or max_num_batched_tokens < 1:
            raise ValueError("max_num_seqs and max_num_batched_tokens must be at least 1")
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.eos_token_ids = frozenset(eos_token_ids)
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self.num_preemptions = 0

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def fits(self, num_tokens: int) -> bool:
        """Whether the pool could hold so many tokens of one sequence that has it all to itself."""
        return self.pool.pages_for(num_tokens) <= self.pool.num_pages

    def add(self, sequence: Sequence) -> None:
        """To the end of the queue. Raises ValueError when it could not run even alone: all rests on that."""
        # The last token drawn is never computed, so it needs no slot.
        if not self.fits(sequence.num_prompt + sequence.max_tokens - 1):
            raise ValueError("a sequence that cannot fit into the pool must be rejected before")
        self.waiting.append(sequence)

    def plan(self) -> Plan:
        """The next step's rows. Empty only when there is no work."""
        rows: dict[Sequence, int] = {}
        budget = self.max_num_batched_tokens
        preemptions_before = self.num_preemptions

        for sequence in tuple(self.running):
            if budget == 0:
                break
            if not sequence.pages:  # preempted a moment ago, for one before it
                continue
            num_tokens = min(sequence.num_pending, budget)
            while not self._reserve(sequence, sequence.num_computed + num_tokens):
                victim = self._preempt_least_computed()
                budget += rows.pop(victim, 0)
                if victim is sequence:
                    break
            else:
                rows[sequence] = num_tokens
                budget -= num_tokens

        # Nobody comes in at a step that had to throw somebody out.
        while (
            self.waiting
            and budget > 0
            and len(self.running) < self.max_num_seqs
            and self.num_preemptions == preemptions_before
            and self._reserve(self.waiting[0], len(self.waiting[0].token_ids))
        ):
            sequence = self.waiting.popleft()
            self.running.append(sequence)
            rows[sequence] = min(sequence.num_pending, budget)
            budget -= rows[sequence]
        return Plan(tuple(Row(sequence, num_tokens) for sequence, num_tokens in rows.items()))

    def settle(self, plan: Plan, tokens: list[int]) -> list[Sequence]:
        """Take in a step: `tokens` has one id per sampling row, in order. Returns who left.

        Those carry an `output`; one whose token is -1 (logits that were not finite) leaves without.
        """
        drawn = iter(tokens)
        finished: list[Sequence] = []
        for row in plan.rows:
            sequence, samples = row.sequence, row.samples
            sequence.num_computed += row.num_tokens
            if not samples:
                continue
            token_id = next(drawn)
            if token_id < 0:
                finished.append(sequence)
                continue
            sequence.token_ids.append(token_id)
            sequence.output = self._output(sequence, token_id)
            if sequence.output is not None:
                finished.append(sequence)
        if finished:
            for sequence in finished:
                self._give_back(sequence)
            gone = set(finished)
            self.running = [sequence for sequence in self.running if sequence not in gone]
        return finished

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out at once, wherever it is (aborted, or ended by a stop string), with its pages."""
        self._give_back(sequence)
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def check(self) -> None:
        """The invariant of pages and queues; raises AssertionError. For tests, after every step."""
        self.pool.check(sequence.pages for sequence in self.running)
        assert len(self.running) <= self.max_num_seqs, "too many sequences run"
        live = [*self.running, *self.waiting]
        assert len(set(live)) == len(live), "a sequence is queued twice"
        for sequence in self.running:
            held = len(sequence.pages) * self.pool.page_size
            assert sequence.num_computed <= held, "computed tokens without a page"
            assert sequence.num_pending >= 1, "a running sequence has nothing to compute"
        for sequence in self.waiting:
            assert not sequence.pages, "a waiting sequence holds pages"
            assert sequence.num_computed == 0, "a waiting sequence has computed tokens"

    def _output(self, sequence: Sequence, token_id: int) -> Output | None:
        """What ended `sequence` with this token, if anything did. End of sequence comes before stop tokens."""
        sampling = sequence.request.sampling
        if sequence.num_generated > sampling.min_tokens:
            if token_id in self.eos_token_ids and not sampling.ignore_eos:
                return Output(token_ids=tuple(sequence.generated), finish_reason="stop")
            if token_id in sampling.stop_token_ids:
                return Output(token_ids=tuple(sequence.generated), finish_reason="stop", stop_reason=token_id)
        if sequence.num_generated >= sequence.max_tokens:
            return Output(token_ids=tuple(sequence.generated), finish_reason="length")
        return None

    def _reserve(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give `sequence` pages for its first `num_tokens` tokens; False, and nothing taken, if too few are free."""
        pages = self.pool.allocate(max(0, self.pool.pages_for(num_tokens) - len(sequence.pages)))
        if pages is None:
            return False
        sequence.pages += pages
        return True

    def _preempt_least_computed(self) -> Sequence:
        """Of equals, the one admitted last."""
        victim = min(reversed(self.running), key=lambda sequence: sequence.num_computed)
        self.running.remove(victim)
        self._give_back(victim)
        victim.num_computed = 0
        victim.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(victim)
        return victim

    def _give_back(self, sequence: Sequence) -> None:
        self.pool.free(sequence.pages)
        sequence.pages = []
