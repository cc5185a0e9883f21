"""Loaded by every Python process that has this folder on its path. In an engine process nothing is computed: each row
that samples gets the end of sequence at once, and nothing that was guessed is right. Scheduler, pages and frames are
the real ones.
"""

import sys

if "engine.process" in sys.orig_argv:
    from engine.plan import Draws, Launched, Plan
    from engine.runner import ModelRunner

    def _launch(runner: ModelRunner, plan: Plan) -> Launched:
        count = len(plan.sampling_rows)
        draws = Draws([runner.model_config.eos_token_ids[0]] * count, {}, further=([],) * count)
        return lambda: draws

    ModelRunner.launch = _launch  # type: ignore[method-assign]
