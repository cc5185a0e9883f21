"""Files of jobs on the command line: where they are cut, and what is said of one that is none."""

from __future__ import annotations

import json
from io import BytesIO

import click
import pytest

from api.cli_job_file import bodies_of


def test_many_lines_become_several_batches() -> None:
    made = [body["jobs"] for body in bodies_of(BytesIO(b'{"prompt": "a"}\n' * 20_001))]
    assert [len(jobs) for jobs in made] == [10_000, 10_000, 1]
    long = json.dumps({"prompt": "x" * 20_000_000}).encode()
    assert [len(body["jobs"]) for body in bodies_of(BytesIO(b"\n".join([long] * 3)))] == [1, 1, 1]


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_mark_of_byte_order_and_ends_of_lines_change_nothing(end: bytes) -> None:
    text = b"\xef\xbb\xbf" + end.join([b'{"prompt": "a"}', b"", b'{"prompt": "b"}', b""])
    assert list(bodies_of(BytesIO(text))) == [{"jobs": [{"prompt": "a"}, {"prompt": "b"}]}]


OPENAI = b'{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {}}'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b" ", "holds no job"),
        (b"3", "must hold a job"),
        (b'{"prompt": "a"}\n{"prompt": ', "line 2, column 12: not JSON: Expecting value"),
        (b'{\n  "prompt": "a",\n}', "line 3, column 1: not JSON"),  # meant as one value, not as three lines
        (b'{"prompt": "a"} x', "line 1, column 17: not JSON: Extra data"),
        (b'{"prompt": "a"}\n{"prompt": "caf\xe9"}\n', "line 2: is not UTF-8"),
        ('{"prompt": "a"}\n'.encode("utf-16"), "line 1: is not UTF-8"),
        (OPENAI, "nightpress run-batch"),
        (OPENAI + b"\n" + OPENAI, "POST /v1/files"),
        (b"[" + OPENAI + b"]", "lines of an OpenAI batch, not jobs"),
    ],
)
def test_what_is_no_file_of_jobs_is_told(text: bytes, said: str) -> None:
    with pytest.raises(click.UsageError) as refused:
        list(bodies_of(BytesIO(text)))
    assert said in refused.value.message
