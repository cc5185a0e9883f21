"""The contract: schemathesis reads /openapi.json and asks whatever it allows, and what it does not.

A press of its own, with keys, a model of short contexts and nobody else's jobs: whatever is accepted is run.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.keys import Scope
from jobs.tenants import DEFAULT
from tests.story.conftest import opened_press
from tests.support.clients import key_of
from tests.support.databases import Databases
from tests.support.press import Press
from tests.support.tiny import write_tiny_llama

# positive_data_acceptance is left out: ranges of sampling parameters, and what must go together, are not in the
# schema, so what it allows may be refused. The rest of what schemathesis can check is checked.
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
    "ignored_auth",
    "use_after_free",
)


@pytest.fixture
def own_press(databases: Databases, tmp_path: Path, given_redis_url: str | None) -> Iterator[Press]:
    model = write_tiny_llama(tmp_path / "model", max_position=64)
    with (
        databases.fresh("postgresql") as url,
        opened_press(tmp_path, url, given_redis_url, model, NIGHTPRESS_DEFAULT_MAX_TOKENS="16") as press,
    ):
        yield press


@pytest.mark.long
def test_schemathesis(own_press: Press, tmp_path: Path) -> None:
    own_press.start_workers(1)
    key = key_of(own_press.database, DEFAULT, *Scope)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{own_press.http.base_url}/openapi.json"),
            *("--checks", ",".join(CHECKS), "--max-examples", "30", "--continue-on-failure"),
            *("-H", f"Authorization: Bearer {key}", "--no-color", "--seed", "20261124"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-20_000:]
    generated = re.search(r"(\d[\d,]*) generated", said)
    assert generated is not None, said[-3_000:]
    assert int(generated[1].replace(",", "")) > 1_000
