"""Workloads: which requests an engine gets.

Owns prompts, lengths and sampling of the three workloads. Knows no engine and no clock.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from engine.request import Request, RequestId
from engine.sampling_params import SamplingParams
from tests.bench.gpu.setting import Setting
from tests.bench.gpu.shapes import QWEN3_06B, QWEN3_8B

_AMPLE_BYTES = 120 * 2**30  # of device memory, from which on twice as many of the larger model's requests run
CHUNK = 16384  # tokens of one step at most


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """`prompts[k]` is to be followed by `new_tokens[k]` tokens, whatever they are. `shared`: leading tokens that all
    prompts have in common."""

    name: str
    model: Mapping[str, Any]  # a config.json
    prompts: list[list[int]]
    new_tokens: list[int]
    temperature: float
    max_model_len: int
    shared: int = 0

    @property
    def num_prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def num_new_tokens(self) -> int:
        return sum(self.new_tokens)

    def requests(self) -> list[Request]:
        return [
            Request(
                id=RequestId(f"{self.name}-{k}", 1),
                prompt_token_ids=tuple(prompt),
                sampling=SamplingParams(
                    temperature=self.temperature, max_tokens=count, ignore_eos=True, seed=k
                ),
            )
            for k, (prompt, count) in enumerate(zip(self.prompts, self.new_tokens, strict=True))
        ]

    def first(self, count: int) -> Workload:
        return replace(self, prompts=self.prompts[:count], new_tokens=self.new_tokens[:count])

    def scaled(self, share: float) -> Workload:
        """Output lengths times `share`, at least one token each."""
        return replace(self, new_tokens=[max(1, round(count * share)) for count in self.new_tokens])

    def warm_up(self, count: int = 32) -> Workload:
        """A few requests that meet what the workload will: its prompt lengths, its longest context, a prefix that all
        share if there is one, and ever fewer rows until there is one. The ids are others, so that no prompt is found
        computed later."""
        rng = random.Random(1)
        count = len(self.prompts) if self.shared else count
        lengths = [len(prompt) for prompt in self.prompts[:count]]
        longest = max(len(p) + n for p, n in zip(self.prompts, self.new_tokens, strict=True))
        lengths[0] = max(lengths[0], longest - 32)
        most = max(1, min(self.max_model_len - max(lengths), len(lengths), 32))
        prefix = [rng.randrange(3, 500) for _ in range(self.shared)]
        return replace(
            self,
            name=f"{self.name}-warm-up",
            prompts=[
                prefix + [rng.randrange(3, 500) for _ in range(max(1, length - len(prefix)))]
                for length in lengths
            ],
            new_tokens=[1 + k % most for k in range(len(lengths))],
        )

    def cut(self, new_tokens: int) -> Workload:
        """The same with at most so many new tokens each."""
        return replace(self, new_tokens=[min(new_tokens, count) for count in self.new_tokens])


def nano(setting: Setting) -> Workload:
    """nano-vllm's published benchmark, draw for draw (its bench.py)."""
    num, longest = (12, 48) if setting.tiny else (256, 1024)
    shortest, ids = (8, 500) if setting.tiny else (100, 10000)
    rng = random.Random(0)
    prompts = [[rng.randint(0, ids) for _ in range(rng.randint(shortest, longest))] for _ in range(num)]
    return Workload(
        name="nano",
        model=QWEN3_06B,
        prompts=prompts,
        new_tokens=[rng.randint(shortest, longest) for _ in range(num)],
        temperature=0.6,
        max_model_len=4096,
    )


def eight(setting: Setting, memory_bytes: int) -> Workload:
    """As many tokens in as out, with the shape of an 8B model."""
    num, length = (256 if memory_bytes > _AMPLE_BYTES else 128), 1024
    if setting.tiny:
        num, length = 6, 32
    return Workload(
        name="eight",
        model=QWEN3_8B,
        prompts=_random_prompts(num, length, setting),
        new_tokens=[length] * num,
        temperature=0.0,
        max_model_len=4096,
    )


def shared(setting: Setting) -> Workload:
    """Requests on one long prefix, each with a few tokens of its own."""
    num, prefix, own, new = (8, 64, 8, 8) if setting.tiny else (256, 2048, 64, 256)
    common = _random_prompts(1, prefix, setting)[0]
    return Workload(
        name="shared",
        model=QWEN3_06B,
        prompts=[common + rest for rest in _random_prompts(num, own, setting, seed=3)],
        new_tokens=[new] * num,
        temperature=0.0,
        max_model_len=4096,
        shared=prefix,
    )


def decoding(model: Mapping[str, Any], rows: int, new_tokens: int, setting: Setting) -> Workload:
    """Short prompts, so that nearly all steps decode."""
    length, new = (8, 8) if setting.tiny else (64, new_tokens)
    return Workload(
        name=f"decoding-{rows}",
        model=model,
        prompts=_random_prompts(rows, length, setting),
        new_tokens=[new] * rows,
        temperature=0.0,
        max_model_len=512,
    )


def _random_prompts(num: int, length: int, setting: Setting, seed: int = 2) -> list[list[int]]:
    rng, ids = random.Random(seed), 500 if setting.tiny else 10000
    return [[rng.randrange(3, ids) for _ in range(length)] for _ in range(num)]
