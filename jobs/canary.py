"""Canary: a harmless request that an engine answers before it is given any job.

Owns what is asked, and that nobody hears of what it cost: it comes first, and is slower than work is. A device that
is broken loads a model all the same, and then every step ends the process, whatever is in it: jobs that met it alone
would look guilty, one after the other (`quarantine`). So an engine counts as started only when it has made tokens of
this, and one that has made none is a failed start, which is nobody's fault. What ends with a job alone in it, after
that, ends of the job. Knows no process.
"""

from __future__ import annotations

from collections.abc import Mapping

from engine.request import Request, RequestId
from engine.sampling_params import SamplingParams
from engine.wire import Hello

CANARY = RequestId("canary", 0)  # a job's fence is at least 1
PROMPT_TOKENS = 32
MAX_TOKENS = 8  # a step of a prompt, and some that only decode

_STATES = frozenset({"num_pages", "num_free_pages", "num_cached_pages"})  # the other stats count


def canary(hello: Hello) -> Request:
    """For the engine that said `hello`. Its answer may be an error, such as of logits that are not finite: that harms
    the jobs that meet it, and no others."""
    length = max(1, min(PROMPT_TOKENS, hello.max_model_len - 1))
    return Request(
        id=CANARY,
        prompt_token_ids=tuple(number % hello.vocab_size for number in range(length)),
        sampling=SamplingParams(temperature=1.0, seed=1, max_tokens=MAX_TOKENS, ignore_eos=True),
        cache_salt=CANARY.job_id,
    )


def without(cost: Mapping[str, int | float], stats: Mapping[str, int | float]) -> dict[str, int | float]:
    """`Engine.stats` as if there had been no canary. `cost`: the stats when it was over, before anything else."""
    return {name: value if name in _STATES else value - cost.get(name, 0) for name, value in stats.items()}
