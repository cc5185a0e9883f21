"""The Python door: order, text, seeds, and outputs that fail alone."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine import LLM, SamplingParams
from engine.sampling_params import InvalidParameter
from tests.support.tiny import write_tiny_llama
from tests.support.tree import ROOT

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(str(folder), kv_cache_memory_bytes=1 << 22, max_num_seqs=4, threads=1)


def test_outputs_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    prompts = ["one", {"prompt_token_ids": [5, 6, 7]}, "a rather longer prompt", "x"]
    params = [SamplingParams(temperature=0, max_tokens=k, ignore_eos=True) for k in (9, 3, 6, 1)]
    together = llm.generate(prompts, params, use_tqdm=False)
    assert [len(one.outputs[0].token_ids) for one in together] == [9, 3, 6, 1]
    assert [one.prompt for one in together] == ["one", None, "a rather longer prompt", "x"]
    assert together[1].prompt_token_ids == (5, 6, 7)
    for prompt, param, one in zip(prompts, params, together, strict=True):
        alone = llm.generate(prompt, param, use_tqdm=False)
        assert [sample.token_ids for sample in alone[0].outputs] == [
            sample.token_ids for sample in one.outputs
        ]
        assert one.outputs[0].text == llm.tokenizer.decode(one.outputs[0].token_ids)


def test_more_prompts_than_places(llm: LLM) -> None:
    outputs = llm.generate([f"prompt {number}" for number in range(30)], GREEDY, use_tqdm=False)
    assert [one.prompt for one in outputs] == [f"prompt {number}" for number in range(30)]
    assert not llm.engine.has_work


def test_a_prompt_that_cannot_run_does_not_spoil_the_others(
    llm: LLM, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = [
        "good",
        "x" * 600,
        {"prompt_token_ids": [5, 9999]},
        {"prompt_token_ids": [1.5]},
        "good",
        "\ud800",
    ]
    with caplog.at_level(logging.WARNING):
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)  # type: ignore[list-item]
    codes = [one.error.code if one.error else None for one in outputs]
    assert codes == [
        None,
        "context_length_exceeded",
        "invalid_request",
        "invalid_request",
        None,
        "invalid_request",
    ]
    assert [one.outputs[0].finish_reason for one in outputs] == [
        "length",
        "error",
        "error",
        "error",
        "length",
        "error",
    ]
    assert outputs[0].outputs[0].token_ids == outputs[4].outputs[0].token_ids
    assert len(caplog.records) == 4


def test_what_is_wrong_with_the_call_raises_before_any_work(llm: LLM) -> None:
    with pytest.raises(TypeError, match=r"prompts\[1\]"):
        llm.generate(["a", 3], GREEDY, use_tqdm=False)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="2 given for 1 prompts"):
        llm.generate(["a"], [GREEDY, GREEDY], use_tqdm=False)
    with pytest.raises(InvalidParameter, match="max_num_seqs"):
        LLM("anything", max_num_seqs=0)
    assert llm.generate([], GREEDY, use_tqdm=False) == []
    assert not llm.engine.has_work


def test_seeds(folder: Path, llm: LLM) -> None:
    seeded = SamplingParams(seed=3, max_tokens=12, n=2)
    first, second = (llm.generate("a", seeded, use_tqdm=False)[0].outputs for _ in range(2))
    assert [one.token_ids for one in first] == [one.token_ids for one in second]
    assert first[0].token_ids != first[1].token_ids

    unseeded = SamplingParams(max_tokens=12)
    same, other = llm.generate(["a", "a"], unseeded, use_tqdm=False)
    assert same.outputs[0].token_ids != other.outputs[0].token_ids

    def fresh(seed: int) -> tuple[int, ...]:
        made = LLM(str(folder), kv_cache_memory_bytes=1 << 22, seed=seed, threads=1)
        return made.generate("a", unseeded, use_tqdm=False)[0].outputs[0].token_ids

    assert fresh(1) == fresh(1) != fresh(2)


def test_text_ends_before_a_stop_string(llm: LLM) -> None:
    whole = llm.generate("hello", SamplingParams(temperature=0, max_tokens=20), use_tqdm=False)[0].outputs[0]
    stop = whole.text[5:7]
    cut = llm.generate("hello", SamplingParams(temperature=0, max_tokens=20, stop=stop), use_tqdm=False)[
        0
    ].outputs[0]
    assert cut.text == whole.text[: whole.text.find(stop)]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    kept = llm.generate(
        "hello",
        SamplingParams(temperature=0, max_tokens=20, stop=stop, include_stop_str_in_output=True),
        use_tqdm=False,
    )[0].outputs[0]
    assert kept.text == cut.text + stop
    assert kept.token_ids == cut.token_ids


@pytest.mark.parametrize("kept", [False, True])
def test_a_stop_token_is_text_only_if_it_is_kept(llm: LLM, kept: bool) -> None:
    whole = llm.generate("hello", SamplingParams(temperature=0, max_tokens=9), use_tqdm=False)[0].outputs[0]
    at = next(i for i in range(9) if llm.tokenizer.decode(whole.token_ids[i : i + 1]).strip())
    params = SamplingParams(
        temperature=0,
        max_tokens=9,
        stop_token_ids=(whole.token_ids[at],),
        include_stop_str_in_output=kept,
    )
    output = llm.generate("hello", params, use_tqdm=False)[0].outputs[0]
    end = whole.token_ids.index(whole.token_ids[at]) + 1
    assert (output.token_ids, output.finish_reason) == (whole.token_ids[:end], "stop")
    assert output.text == llm.tokenizer.decode(whole.token_ids[: end if kept else end - 1])


def test_chat(llm: LLM) -> None:
    chat = [{"role": "user", "content": "hi"}]
    one = llm.chat(chat, GREEDY, use_tqdm=False)
    many = llm.chat([chat, [{"role": "user"}], chat], GREEDY, use_tqdm=False)  # type: ignore[list-item]
    assert one[0].prompt_token_ids == tuple(llm.tokenizer.encode_chat(chat))
    assert [many[0].outputs, many[2].outputs] == [one[0].outputs] * 2
    assert many[1].error is not None
    assert "exactly the fields" in many[1].error.message


def test_a_chat_hands_variables_to_its_template(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "model")
    template = "{% if enable_thinking is false %}hush {% endif %}{{ messages[0].content }}"
    (folder / "chat_template.jinja").write_text(template)
    llm = LLM(str(folder), kv_cache_memory_bytes=1 << 22, max_num_seqs=4, threads=1)
    chats = [[{"role": "user", "content": text}] for text in ("hi", "fox")]
    hushed = llm.chat(chats, GREEDY, use_tqdm=False, chat_template_kwargs={"enable_thinking": False})
    told = [llm.tokenizer.decode(one.prompt_token_ids) for one in hushed]
    assert told == ["hush hi", "hush fox"]
    plain = llm.chat(chats, GREEDY, use_tqdm=False, chat_template_kwargs={"unread": 1})
    assert [llm.tokenizer.decode(one.prompt_token_ids) for one in plain] == ["hi", "fox"]
    for given in ({"messages": 1}, {"enable_thinking": "<s>"}):
        with pytest.raises(ValueError, match=f"chat_template_kwargs.{next(iter(given))}: "):
            llm.chat(chats, GREEDY, use_tqdm=False, chat_template_kwargs=given)


def test_streaming_takes_prompts_as_needed_and_gives_results_as_they_finish(llm: LLM) -> None:
    taken = 0

    def endless():  # type: ignore[no-untyped-def]
        nonlocal taken
        while True:
            taken += 1
            yield f"prompt {taken}", GREEDY

    results = llm.stream(endless())
    seen = [next(results)[0] for _ in range(10)]
    assert sorted(seen) == list(range(10))
    assert taken <= 10 + 2 * 4 + 4
    results.close()
    assert not llm.engine.has_work
    assert llm.engine.pool.num_available == llm.engine.pool.num_pages


def test_the_bar_can_be_shown(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(["a", "b"], GREEDY)
    assert "2/2" in capsys.readouterr().err


def test_importing_the_words_loads_no_torch() -> None:
    program = (
        "import sys, engine; engine.SamplingParams(); import engine.request, engine.engine;"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_python_door_tells_openmp_how_to_wait_before_torch_comes() -> None:
    """Unless somebody has said it already."""
    code = (
        "import os, sys; from engine import LLM; print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    )
    for given, expected in (({}, "1000 False"), ({"GOMP_SPINCOUNT": "7"}, "7 False")):
        environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"} | given
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == expected
