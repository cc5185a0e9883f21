"""CheckedRunner: stands where the device stands and checks what the planning half promises, without torch.

Its memory holds, in every slot, the fingerprint of all tokens up to the one that was computed there. A row whose
earlier slots do not hold exactly its own history raises, so a page that was shared, copied, swapped or evicted
wrongly cannot go unnoticed. Tokens are drawn from the fingerprint and the seed: what a request gets depends
on the request alone, and `expected` says it without any engine. So do the logprobs of prompts: each is made from
the fingerprint of the tokens before it, and `scored` remembers which were asked for, so that none is taken twice.
"""

from __future__ import annotations

import random
from collections.abc import Iterable

from engine.config import EngineConfig
from engine.engine import Engine
from engine.plan import Draws, Launched, Move, Plan, PromptScores
from engine.request import Request, RequestId, TokenLogprobs, derive_seed
from engine.sequence import Sequence
from engine.speculation import accept
from engine.step_times import StepTimes
from tests.support.shapes import shape

VOCAB_SIZE = 1000
EOS = 2
END_RATE = 12  # one token in so many ends an answer

MODEL = shape(vocab_size=VOCAB_SIZE, eos_token_ids=(EOS,), architecture="Checked", max_position=100_000)


def fingerprints(salt: str, tokens: list[int], known: list[int]) -> list[int]:
    """One per token, each of all tokens up to it; continues `known` in place."""
    value = known[-1] if known else hash(("start", salt))
    for token in tokens[len(known) :]:
        value = hash((value, token))
        known.append(value)
    return known


def draw(fingerprint: int, seed: int, vocab_size: int = VOCAB_SIZE) -> int:
    rng = random.Random(fingerprint ^ seed)
    return EOS if rng.randrange(END_RATE) == 0 else rng.randrange(3, vocab_size)


def expected(request: Request, index: int, max_tokens: int, vocab_size: int = VOCAB_SIZE) -> tuple[int, ...]:
    """What sample `index` of a request must get."""
    sampling, seed = request.sampling, request.sampling.seed or 0
    seed = 0 if sampling.greedy else seed if index == 0 else derive_seed(seed, index)
    tokens, known = list(request.prompt_token_ids), list[int]()
    made: list[int] = []
    while len(made) < max_tokens:
        made.append(draw(fingerprints(request.cache_salt, tokens, known)[-1], seed, vocab_size))
        tokens.append(made[-1])
        if made[-1] == EOS and not sampling.ignore_eos:
            break
    return tuple(made)


def score(fingerprint: int, token_id: int) -> TokenLogprobs:
    return TokenLogprobs(token_id=token_id, logprob=-float(fingerprint % 1000))


def expected_scores(request: Request) -> tuple[TokenLogprobs | None, ...] | None:
    """The `prompt_logprobs` that a request must get."""
    if request.sampling.prompt_logprobs is None:
        return None
    tokens = list(request.prompt_token_ids)
    known = fingerprints(request.cache_salt, tokens, [])
    return (None, *(score(before, token) for before, token in zip(known, tokens[1:], strict=False)))


class CheckedRunner:
    model_config = MODEL
    max_model_len = 100_000
    max_num_batched_tokens = 2048
    seconds_per_page_moved: float | None = None
    device, dtype, kernels_name, deterministic = "none", "none", "none", True

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        num_host_pages: int = 0,
        num_scheduler_steps: int = 1,
        num_speculative_tokens: int = 0,
        vocab_size: int = VOCAB_SIZE,
    ) -> None:
        self.num_scheduler_steps = num_scheduler_steps
        self.num_speculative_tokens = num_speculative_tokens
        self.vocab_size = vocab_size  # that it draws from
        self.num_pages, self.page_size, self.num_host_pages = num_pages, page_size, num_host_pages
        self.num_moves = 0
        self.times = StepTimes()
        self.scored: list[tuple[RequestId, int, int]] = []  # request, sample, position, in order
        self._memory: list[list[int | None]] = [[None] * page_size for _ in range(num_pages)]
        self._host: list[list[int | None]] = [[None] * page_size for _ in range(num_host_pages)]
        self._known: dict[Sequence, list[int]] = {}
        self._ahead: dict[Sequence, list[int]] = {}

    def run(self, plan: Plan) -> Draws:
        size, memory = self.page_size, self._memory
        self._move(plan.moves)
        drawn: list[int] = []
        scores: dict[int, PromptScores] = {}
        written: set[tuple[int, int]] = set()
        for place, row in enumerate(plan.rows):
            one = row.sequence
            known = fingerprints(one.request.cache_salt, one.token_ids, self._known.setdefault(one, []))
            for at in range(one.num_computed):
                found = memory[one.pages[at // size]][at % size]
                assert found == known[at], f"token {at} of {one.request.id} is not what was computed for it"
            further = fingerprints(one.request.cache_salt, [*one.token_ids, *row.proposed], [])
            for at in range(one.num_computed, one.num_computed + row.num_queries):
                slot = one.pages[at // size], at % size
                assert slot not in written, "two rows write to one slot"
                written.add(slot)
                memory[slot[0]][slot[1]] = further[at]
            if row.scored:
                self.scored += [(one.request.id, one.index, at) for at in row.scored]
                scores[place] = [score(known[at], one.token_ids[at + 1]) for at in row.scored]
            if row.samples:
                seed = 0 if one.request.sampling.greedy else one.seed
                drawn += (draw(behind, seed, self.vocab_size) for behind in further[len(known) - 1 :])
        return accept(plan.sampling_rows, Draws(drawn, {}, scores))

    def _move(self, moves: Iterable[Move]) -> None:
        memory = self._memory
        for kind, source, target in moves:
            self.num_moves += 1
            if kind == "copy":
                memory[target] = list(memory[source])
            elif kind == "out":
                self._host[target] = list(memory[source])
            else:
                memory[target] = list(self._host[source])

    def launch(self, plan: Plan) -> Launched:
        """All at once; what a plan of several steps drew is remembered for one that goes on behind it."""
        draws = self.run(plan) if plan.num_steps == 1 else self._run_together(plan)
        return lambda: draws

    def _run_together(self, plan: Plan) -> Draws:
        """As a device does it: rows go on with what they drew, until their limit."""
        if not plan.behind:
            self.run(Plan(plan.rows, plan.moves))  # what they hold is as it must be
        else:
            self._move(plan.moves)
        made: dict[Sequence, list[int]] = {}
        for row in plan.rows:
            one = row.sequence
            tokens = one.token_ids + (self._ahead[one] if plan.behind else [])
            seed = 0 if one.request.sampling.greedy else one.seed
            drawn = made[one] = []
            for step in range(plan.behind, plan.behind + plan.num_steps):
                at = one.num_computed + step
                if one.pages and step < one.num_wanted:
                    known = fingerprints(one.request.cache_salt, [*tokens, *drawn][: at + 1], [])
                    self._memory[one.pages[at // self.page_size]][at % self.page_size] = known[at]
                    drawn.append(draw(known[at], seed, self.vocab_size))
                else:
                    drawn.append(EOS)  # whatever it is, nobody may want it
        self._ahead = made
        return Draws(
            [made[row.sequence][0] for row in plan.rows], {}, further=tuple(d[1:] for d in made.values())
        )


def checked_engine(
    num_pages: int,
    page_size: int = 4,
    *,
    num_host_pages: int = 0,
    steps: int = 1,
    speculative_tokens: int = 0,
    vocab_size: int = VOCAB_SIZE,
    **settings: object,
) -> Engine:
    config = EngineConfig(model="checked", **settings)  # type: ignore[arg-type]
    runner = CheckedRunner(num_pages, page_size, num_host_pages, steps, speculative_tokens, vocab_size)
    return Engine(runner, None, config)
