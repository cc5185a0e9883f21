"""Steps of decoding whose rows share prefixes: what attention is told, and the same logits and tokens with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.cache import KVCache
from engine.checkpoint import Checkpoint
from engine.decode_steps import DecodeSteps
from engine.model import Decoder
from engine.plan import Row
from engine.runner import load_decoder
from engine.sampling_params import SamplingParams
from kernels import KernelSet, Sharing, kernels_for
from tests.support.rollout import sequence
from tests.support.tiny import write_tiny_llama

PAGE = 16
PREFIX = list(range(34))  # pages that rows share: 544 tokens
CONTEXTS = {0: 560, 2: 545, 3: 600, 5: 580}  # of rows that share them
OTHERS = {1: 20, 4: 530}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model"), num_layers=1, max_position=1024)


def prepared(model: Path, kernels: KernelSet) -> tuple[Decoder, KVCache]:
    """A decoder over pages of which every one holds something."""
    checkpoint = Checkpoint.open(str(model))
    decoder = load_decoder(checkpoint, kernels_for("cpu", kernels), dtype=torch.float32, device="cpu")
    assert isinstance(decoder, Decoder)
    decoder.prepare(1024)
    by_token = decoder.kernels.keys_by_token
    cache = KVCache.allocate(
        checkpoint.config, 150, PAGE, dtype=torch.float32, device="cpu", keys_by_token=by_token
    )
    generator = torch.Generator().manual_seed(1)
    for layer in cache.layers:
        for part in (layer.keys, layer.values):
            part.copy_(torch.randn(part.shape, generator=generator))
    return decoder, cache


def plan(contexts: dict[int, int]) -> tuple[Row, ...]:
    """Rows that compute the last token of a context, with pages for three more."""
    rows, fresh = [], iter(range(len(PREFIX), 150))
    for row in sorted(contexts):
        length = contexts[row]
        prompt = [(row * 31 + token) % 300 + 3 for token in range(length)]
        one = sequence(prompt, SamplingParams(temperature=0.0, seed=1, max_tokens=9), row)
        one.num_computed = length - 1
        one.pages = list(PREFIX) if row in CONTEXTS else []
        one.pages += [next(fresh) for _ in range(-(-(length + 3) // PAGE) - len(one.pages))]
        rows.append(Row(one, 1))
    return tuple(rows)


def steps_of(decoder: Decoder, cache: KVCache, *, shares: bool) -> DecodeSteps:
    return DecodeSteps(
        decoder,
        cache,
        page_size=PAGE,
        most_rows=8,
        most_pages=64,
        most_steps=4,
        row_multiple=1,
        sharing=Sharing(least_tokens=512, least_rows=4, exact=False) if shares else None,
    )


def test_what_attention_is_told(model: Path) -> None:
    decoder, cache = prepared(model, "reference")
    steps = steps_of(decoder, cache, shares=True)
    with torch.inference_mode():
        hint = steps._inputs.step(steps._write(plan({**CONTEXTS, **OTHERS}), 1)).shared
        assert hint is not None
        assert hint.starts.tolist() == [0, *[4] * 8]
        assert hint.members[:4].tolist() == [0, 2, 3, 5]
        assert hint.tokens.tolist() == [544, 0, 544, 544, 0, 544]
        for fewer in (OTHERS, {row: CONTEXTS[row] for row in (0, 2, 3)}):
            assert steps._inputs.step(steps._write(plan(fewer), 1)).shared is None
        steps = steps_of(decoder, cache, shares=False)
        assert steps._inputs.step(steps._write(plan(CONTEXTS), 1)).shared is None


@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_the_same_logits_and_tokens(model: Path, kernels: KernelSet) -> None:
    rows = plan({**CONTEXTS, **OTHERS})
    logits, tokens = [], []
    for shares, chosen in ((False, "reference"), (True, kernels)):
        decoder, cache = prepared(model, chosen)  # type: ignore[arg-type]
        steps = steps_of(decoder, cache, shares=shares)
        with torch.inference_mode():
            logits.append(steps.logits(rows).clone())
            tokens.append(steps.launch(rows, 2).tokens())
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-3, atol=1e-3)
    assert tokens[1] == tokens[0]
    assert len(tokens[0]) == len(rows)
