"""Loaded by every Python process that has this folder on its path. In an engine process nothing is computed: each row
that samples gets the end of sequence at once. Scheduler, pages and frames are the real ones.
"""

import sys

if "engine.process" in sys.orig_argv:
    from engine.plan import Draws, Launched, Plan
    from engine.runner import ModelRunner

    def _launch(runner: ModelRunner, plan: Plan) -> Launched:
        draws = Draws([runner.model_config.eos_token_ids[0]] * len(plan.sampling_rows), {})
        return lambda: draws

    ModelRunner.launch = _launch  # type: ignore[method-assign]
