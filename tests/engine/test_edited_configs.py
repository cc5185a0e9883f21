"""A config.json that was edited, or that says a thing twice, is read as transformers reads it: the logprobs of a prompt
are those of the model that `AutoModelForCausalLM` makes of the same folder.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.config import EngineConfig
from engine.engine import Engine
from engine.request import Request, RequestId
from engine.sampling_params import SamplingParams
from tests.support.families import write_tiny
from tests.support.pressure import run
from tests.support.tiny import VOCAB_SIZE

SLIDING, FULL = "sliding_attention", "full_attention"
EDITED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # the model, and what is then written over
    "Mistral with layer_types": ("Mistral", {"sliding_window": 9}, {"layer_types": [FULL, SLIDING]}),
}
PROMPT = tuple(random.Random(5).choices(range(3, VOCAB_SIZE), k=70))


def edit(folder: Path, fields: dict[str, Any]) -> None:
    """`None` takes a field away."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def ours(folder: Path) -> list[float]:
    engine = Engine.load(
        EngineConfig(model=str(folder), dtype="float32", device="cpu", threads=1, max_num_batched_tokens=16)
    )
    sampling = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, seed=1, prompt_logprobs=0)
    request = Request(id=RequestId("one", 1), prompt_token_ids=PROMPT, sampling=sampling)
    scored = run(engine, [request], poison=False)[request.id].prompt_logprobs
    assert scored is not None
    return [one.logprob for one in scored if one is not None]


def theirs(folder: Path) -> list[float]:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").float().eval()
    token_ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        logprobs = model(token_ids).logits[0, :-1].log_softmax(dim=-1)
    return list(logprobs.gather(1, token_ids[0, 1:, None])[:, 0].tolist())


@pytest.mark.parametrize("name", EDITED)
def test_an_edited_config_is_read_as_transformers_reads_it(tmp_path: Path, name: str) -> None:
    family, changes, fields = EDITED[name]
    write_tiny(tmp_path, f"{family}ForCausalLM", changes)
    before = ours(tmp_path)
    edit(tmp_path, fields)
    after = ours(tmp_path)
    assert after == pytest.approx(theirs(tmp_path), abs=1e-4)
    assert after != pytest.approx(before, abs=1e-2)  # the edit tells
