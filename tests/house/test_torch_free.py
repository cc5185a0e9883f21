"""The front of the house starts in a moment and fits in a small container: it never loads torch."""

from __future__ import annotations

import subprocess
import sys
import tomllib

from tests.support.tree import ROOT, module_of, python_files

CONTRACT = "the front of the house never loads torch"  # of import-linter, which sees imports and runs nothing

IMPORT_ALL = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    loaded = {"torch", "triton", "transformers"} & set(sys.modules)
    if loaded:
        sys.exit(f"{name} loads {loaded}")
"""


def front_modules() -> list[str]:
    modules = [module_of(path) for path in python_files("api", "jobs", "migrations")]
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    (front,) = (contract["source_modules"] for contract in contracts if contract["name"] == CONTRACT)
    modules += ["engine", *(name for name in front if name.startswith("engine."))]
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
