"""The fallback's edges: what it refuses and when, strict loading, two models side by side, and bits that do not
depend on the crowd. What it computes is compared in `test_fallback_parity.py`.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention

from engine.checkpoint import Checkpoint
from engine.config import EngineConfig
from engine.engine import Engine
from engine.fallback import Elementwise, Fallback
from engine.model_config import UnsupportedCheckpoint
from engine.plan import Plan, Row
from engine.request import Request, RequestId
from engine.runner import ModelRunner
from engine.sampling_params import InvalidParameter, SamplingParams
from engine.sequence import Sequence
from kernels.reference import KERNELS
from tests.engine.test_alone_equals_crowd import comparable, load, make_requests, one_by_one
from tests.engine.test_fallback_parity import OPT, UNSCALED, write_foreign
from tests.support.pressure import run
from tests.support.tiny import SIZES, VOCAB_SIZE, write_tokenizer

TINY = {name: value for name, value in SIZES.items() if not name.endswith("_token_id")}

NO_HEADS = {"num_attention_heads": 1, "max_position_embeddings": 64}  # said, and not true


def write_config(folder: Path, model_type: str, architecture: str, **fields: Any) -> Path:
    """config.json and weights that break whoever reads them."""
    config = transformers.AutoConfig.for_model(model_type, architectures=[architecture], **fields)
    config.save_pretrained(folder)
    save_file({"of_no_model": torch.zeros(1)}, folder / "model.safetensors")
    return folder


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> Fallback:
    checkpoint = Checkpoint.open(str(folder), model_impl="transformers")
    with torch.inference_mode():
        return Fallback.load(checkpoint, KERNELS, dtype=dtype, device="cpu")


def runner_of(folder: Path, **settings: Any) -> ModelRunner:
    config = EngineConfig(
        model=str(folder), model_impl="transformers", kv_cache_memory_bytes=2**20, threads=1, **settings
    )
    return ModelRunner.load(config, Checkpoint.open(str(folder), model_impl="transformers"))


@pytest.mark.parametrize(
    ("model_type", "architecture", "fields", "reason"),
    [
        ("bloom", "BloomForCausalLM", {"n_layer": 2, "seq_length": 64}, "0 times in 2 layers"),
        ("xglm", "XGLMForCausalLM", {"d_model": 64, "num_layers": 2, "attention_heads": 4}, "0 times"),
        ("mpt", "MptForCausalLM", {"d_model": 64, "n_heads": 4, "n_layers": 2}, "cannot be run"),
        ("mamba", "MambaForCausalLM", {"hidden_size": 64, "num_hidden_layers": 2, **NO_HEADS}, "0 times"),
        (
            "minicpm3",
            "MiniCPM3ForCausalLM",
            {"num_hidden_layers": 2},
            "96 channels for q, 96 for k and 64 for v",
        ),
        ("bert", "BertLMHeadModel", {"num_hidden_layers": 2}, "a mask other than causal"),
        ("diffllama", "DiffLlamaForCausalLM", {**TINY}, "4 times in 2 layers"),
        ("opt", "PhiForCausalLM", {"hidden_size": 64}, "model_type opt"),
        ("distilbert", "DistilBertForCausalLM", {}, "model_type distilbert"),
    ],
)
def test_what_cannot_be_run_is_refused_before_any_weight(
    tmp_path: Path, model_type: str, architecture: str, fields: dict[str, Any], reason: str
) -> None:
    folder = write_config(tmp_path, model_type, architecture, **fields)
    with pytest.raises(UnsupportedCheckpoint, match=reason):
        loaded(folder)


@pytest.mark.parametrize(
    ("sinks", "argument", "reason"),
    [
        ((4, 2), {}, r"attention sinks of shape \[4, 2\]"),
        ((1,), {}, r"attention sinks of shape \[1\]"),
        ((4,), {"position_bias": torch.zeros(1)}, "attention with position_bias"),
        ((4,), {}, "is missing"),  # the weights come next
    ],
    ids=str,
)
def test_what_nobody_here_understands_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sinks: tuple[int, ...],
    argument: dict[str, Any],
    reason: str,
) -> None:
    """gpt-oss as a later transformers might have it."""
    asked = GptOssAttention.__init__, GptOssAttention.forward

    def init(self: Any, *args: Any, **fields: Any) -> None:
        asked[0](self, *args, **fields)
        self.sinks = nn.Parameter(torch.empty(sinks))

    monkeypatch.setattr(GptOssAttention, "__init__", init)
    monkeypatch.setattr(
        GptOssAttention, "forward", lambda *args, **given: asked[1](*args, **given, **argument)
    )
    folder = write_config(tmp_path, "gpt_oss", "GptOssForCausalLM", **TINY, rope_parameters=UNSCALED)
    with pytest.raises(UnsupportedCheckpoint, match=reason):
        loaded(folder)


def test_weights_are_what_comes_next(tmp_path: Path) -> None:
    folder = write_config(tmp_path, "starcoder2", "Starcoder2ForCausalLM", **TINY)
    with pytest.raises(UnsupportedCheckpoint, match="is missing"):
        loaded(folder)


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    "fields", [{"auto_map": {"AutoModelForCausalLM": "modeling_fancy.Fancy"}}, {}], ids=str
)
def test_code_of_a_repository_is_never_run(tmp_path: Path, fields: dict[str, Any]) -> None:
    folder = write_config(tmp_path, "phi", "PhiForCausalLM", **TINY)
    change_config(folder, architectures=["FancyForCausalLM"], model_type="fancy", **fields)
    (folder / "modeling_fancy.py").write_text("raise SystemExit('was run')")
    with pytest.raises(UnsupportedCheckpoint, match="auto_map" if fields else "cannot read its config"):
        loaded(folder)


def test_code_of_a_repository_is_not_needed_for_what_transformers_knows(tmp_path: Path) -> None:
    write_foreign(tmp_path, "PhiForCausalLM", {})
    change_config(tmp_path, auto_map={"AutoModelForCausalLM": "modeling_phi.PhiForCausalLM"})
    (tmp_path / "modeling_phi.py").write_text("raise SystemExit('was run')")
    assert loaded(tmp_path).config.num_layers == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_positions_counted_otherwise_are_seen_after_loading(tmp_path: Path, dtype: str) -> None:
    write_foreign(tmp_path, "RobertaForCausalLM", {"is_decoder": True, "max_position_embeddings": 66})
    with pytest.raises(UnsupportedCheckpoint, match=r"RobertaForCausalLM.*in a way of its own"):
        runner_of(tmp_path, dtype=dtype)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda tensors: tensors.pop("model.layers.1.mlp.fc1.bias"), "layers.1.mlp.fc1.bias is missing"),
        (lambda tensors: tensors.update(extra=torch.zeros(2)), "extra is not known"),
        (
            lambda tensors: tensors.update({"lm_head.bias": torch.zeros(3)}),
            r"lm_head.bias has shape \(3,\), not \(320,\)",
        ),
    ],
)
def test_tensors_are_read_strictly(tmp_path: Path, change: Any, named: str) -> None:
    write_foreign(tmp_path, "PhiForCausalLM", {})
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedCheckpoint, match=named):
        loaded(tmp_path)


def test_loading_says_nothing_and_changes_no_setting(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_foreign(tmp_path, "OPTForCausalLM", OPT)
    verbosity = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    capfd.readouterr()
    runner = runner_of(tmp_path, dtype="bfloat16")
    assert capfd.readouterr() == ("", "")
    assert transformers.logging.get_verbosity() == verbosity
    assert transformers.logging.is_progress_bar_enabled() == bars
    assert (runner.dtype, runner.deterministic) == ("bfloat16", True)


def test_sizes_of_attention_are_measured(tmp_path: Path) -> None:
    write_foreign(tmp_path, "OPTForCausalLM", {**OPT, "num_key_value_heads": 1})  # OPT has no such field
    assert Checkpoint.open(str(tmp_path)).config.num_kv_heads == 1
    runner = runner_of(tmp_path)
    assert runner.model_config.num_kv_heads == 4
    assert runner.cache.layers[0].keys.shape[1] == 4


def test_every_linear_map_is_checked_for_its_rows(tmp_path: Path) -> None:
    write_foreign(tmp_path, "StableLmForCausalLM", {"use_qkv_bias": True})
    products = loaded(tmp_path).distinct_products()
    shapes = [(product.num_outputs, product.num_inputs) for product in products]
    # q, with a bias; k and v; out, without; gate and up; down; the head
    assert sorted(shapes) == sorted([(64, 64), (32, 64), (64, 64), (96, 64), (64, 96), (VOCAB_SIZE, 64)])
    for product in products:
        assert product(torch.zeros(3, product.num_inputs)).shape == (3, product.num_outputs)


def sequence(tokens: list[int], pages: list[int]) -> Sequence:
    request = Request(
        id=RequestId(str(pages), 1), prompt_token_ids=tuple(tokens), sampling=SamplingParams(seed=0)
    )
    made = Sequence(request, 0, max_tokens=1)
    made.pages = pages
    return made


def test_two_models_take_turns_in_one_process(tmp_path: Path) -> None:
    rng = random.Random(5)
    tokens = [rng.randrange(VOCAB_SIZE) for _ in range(20)]
    runners, alone = [], []
    for name, fields in (("PhiForCausalLM", {}), ("OPTForCausalLM", OPT)):
        write_foreign(tmp_path / name, name, fields)
        runners.append(runner_of(tmp_path / name, dtype="float32"))
        alone.append(runners[-1].logits(Plan((Row(sequence(tokens, [0, 1]), 20),))))
    halves = [sequence(tokens, [2, 3]) for _ in runners]
    for runner, half in zip(runners, halves, strict=True):
        assert runner.logits(Plan((Row(half, 9),))).shape == (0, VOCAB_SIZE)  # no row samples
        half.num_computed = 9
    for runner, half, expected in zip(runners, halves, alone, strict=True):
        torch.testing.assert_close(runner.logits(Plan((Row(half, 11),))), expected)


@pytest.mark.parametrize("activation", [nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Sigmoid()], ids=str)
@pytest.mark.parametrize("width", [100, 11008, 40000])
def test_an_activation_gives_an_element_the_same_bits_anywhere(activation: nn.Module, width: int) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(3)  # pieces that end inside a row
    try:
        x = torch.randn(1, 37, width, generator=torch.Generator().manual_seed(3))
        evenly = Elementwise(activation)
        together = evenly(x)
        torch.testing.assert_close(together, activation(x))
        for rows in (1, 2, 16, 33):
            assert torch.equal(evenly(x[:, :rows]), together[:, :rows])
        strided = torch.cat((x, x), dim=-1).chunk(2, dim=-1)[0]
        assert torch.equal(evenly(strided), together)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.long)])
def test_alone_is_crowd(tmp_path: Path, dtype: str) -> None:
    fields = {"sliding_window": 40, "intermediate_size": 100, "num_key_value_heads": 4, "eos_token_id": 2}
    write_foreign(tmp_path, "Starcoder2ForCausalLM", fields)
    requests = make_requests(10, longest=20)
    settings: dict[str, Any] = {"dtype": dtype, "threads": 1, "max_num_batched_tokens": 48}
    alone = one_by_one(load(tmp_path, 24, **settings), requests)
    random.Random(2).shuffle(requests)
    engine = load(tmp_path, 24, **settings)
    assert comparable(run(engine, requests, preempting=True)) == alone
    assert engine.stats()["num_preemptions"] > 0


def test_steps_together_are_steps_one_by_one(tmp_path: Path) -> None:
    write_foreign(tmp_path, "OPTForCausalLM", OPT)
    sampling = [
        SamplingParams(temperature=heat, seed=4, max_tokens=9, ignore_eos=True) for heat in (0.0, 1.0)
    ]
    requests = [
        Request(
            id=RequestId(str(number), 1), prompt_token_ids=(5, 6, 7, number), sampling=sampling[number % 2]
        )
        for number in range(5)
    ]
    engines = [load(tmp_path, 24, dtype="float32", num_scheduler_steps=steps) for steps in (1, 4)]
    alone, together = (comparable(run(engine, requests)) for engine in engines)
    assert together == alone
    assert engines[1].stats()["num_steps"] < engines[0].stats()["num_steps"]


def test_experts_may_depend_on_the_crowd(tmp_path: Path) -> None:
    write_foreign(tmp_path, "OlmoeForCausalLM", {"num_experts": 4, "num_experts_per_tok": 2})
    assert not runner_of(tmp_path).deterministic
    with pytest.raises(InvalidParameter, match=r"deterministic.*Olmoe"):
        runner_of(tmp_path, deterministic=True)


def test_a_refusal_reaches_whoever_starts_an_engine(tmp_path: Path) -> None:
    folder = write_config(tmp_path, "bloom", "BloomForCausalLM", n_layer=2, seq_length=64)
    write_tokenizer(folder)
    with pytest.raises(UnsupportedCheckpoint, match="BloomForCausalLM"):
        Engine.load(EngineConfig(model=str(folder)))
