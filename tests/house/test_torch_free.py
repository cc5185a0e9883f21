"""The front of the house starts in a moment and fits in a small container: it never loads torch."""

from __future__ import annotations

import subprocess
import sys

from tests.support.tree import ROOT, module_of, python_files

ENGINE_FRONT = (
    "request",
    "growth",
    "telling",
    "figures",
    "sampling_params",
    "config",
    "config_sizes",
    "families",
    "family_fields",
    "family_storage",
    "field_kinds",
    "special_tokens",
    "stand_ins",
    "template_variables",
    "rope_settings",
    "windows",
    "foreign",
    "checkpoint",
    "gguf_file",
    "gguf_families",
    "safetensors_file",
    "sequence",
    "plan",
    "pages",
)
ENGINE_FRONT += ("prefix_cache", "making_way", "waiting", "warming", "lengths", "forecast", "run")
ENGINE_FRONT += (
    "invalid_parameter",
    "structured_outputs",
    "grammar_source",
    "matcher",
    "grammars",
    "compiling",
)
ENGINE_FRONT += (
    "logit_rules",
    "repetition",
    "vocabulary",
    "scheduler",
    "stop",
    "tokenizer",
    "detokenizer",
    "wire",
    "codec",
)
ENGINE_FRONT += ("reasoning",)
ENGINE_FRONT += ("multi_step", "speculation", "ngram_proposer", "flight", "step_times", "endings", "openmp")

IMPORT_ALL = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    loaded = {"torch", "triton"} & set(sys.modules)
    if loaded:
        sys.exit(f"{name} loads {loaded}")
"""


def front_modules() -> list[str]:
    modules = [module_of(path) for path in python_files("api", "jobs", "migrations")]
    modules += ["engine", *(f"engine.{name}" for name in ENGINE_FRONT)]
    # Alembic runs these two inside a migration; they cannot be imported on their own.
    return [name for name in modules if name != "migrations.env" and not name.endswith("__main__")]


def test_no_front_module_loads_torch() -> None:
    modules = front_modules()
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, *modules], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_the_check_itself_bites() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, "engine.request", "engine.sampler"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert "engine.sampler loads" in done.stderr
