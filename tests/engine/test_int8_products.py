"""Products of 8-bit integers in a whole model: the same promises, nearly the same logits, settings that say no."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.checkpoint import Checkpoint
from engine.config import EngineConfig
from engine.model import Decoder
from engine.quantised_linear import Int8Linear
from engine.runner import ModelRunner
from engine.sampling_params import InvalidParameter
from tests.engine.test_kv_cache_dtype import prompt_of
from tests.engine.test_model import all_logits
from tests.engine.test_runner import assert_neither_crowd_nor_chunk_matters, load
from tests.support.tiny import write_tiny_llama


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tokens_depend_on_neither_crowd_nor_chunk(tmp_path: Path, dtype: str) -> None:
    runner = load(write_tiny_llama(tmp_path), dtype=dtype, quantization="int8")
    assert (runner.deterministic, runner.kernels_name) == (True, "cpu")
    assert_neither_crowd_nor_chunk_matters(runner)


def test_logits_are_near_those_of_plain_weights(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path)
    plain, rounded = (
        all_logits(load(folder, quantization=how), prompt_of(150), 30) for how in (None, "int8")
    )
    difference = (rounded - plain).abs()
    assert 0 < difference.mean() < 0.05 * plain.std()


def test_both_sets_give_the_same_logits(tmp_path: Path) -> None:
    """But for an integer here and there that the order of fp32 sums elsewhere moves by one."""
    folder = write_tiny_llama(tmp_path)
    fast, slow = (
        all_logits(load(folder, kernels=name, quantization="int8"), prompt_of(150), 30)
        for name in ("cpu", "reference")
    )
    difference = (fast - slow).abs()
    assert difference.max() < 0.03 * slow.std()
    assert difference.mean() < 0.002 * slow.std()


@pytest.mark.parametrize("tied", [True, False])
def test_every_product_is_of_integers(tmp_path: Path, tied: bool) -> None:
    runner = load(write_tiny_llama(tmp_path, tied=tied), quantization="int8")
    assert isinstance(runner._decoder, Decoder)
    assert all(type(product) is Int8Linear for product in runner._decoder.distinct_products())


def test_kernels_without_such_products_refuse(tmp_path: Path) -> None:
    with pytest.raises(InvalidParameter, match="quantization: the triton kernels have no int8 products"):
        load(write_tiny_llama(tmp_path), kernels="triton", quantization="int8")


def test_transformers_own_code_refuses(tmp_path: Path) -> None:
    folder = str(write_tiny_llama(tmp_path))
    with pytest.raises(InvalidParameter, match="quantization: transformers' own code computes this model"):
        ModelRunner.load(
            EngineConfig(model=folder, quantization="int8"),
            Checkpoint.open(folder, model_impl="transformers"),
        )
