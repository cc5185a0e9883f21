"""The engine that `bench_noop` measures around: a real process, real scheduling and frames, and nothing computed."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine import wire
from engine.config import EngineConfig
from jobs.canary import MAX_TOKENS, canary
from tests.engine.test_process import Peer
from tests.support.tiny import EOS_TOKEN_ID, write_tiny_llama
from tests.support.tree import ROOT


def test_each_token_is_the_end_of_sequence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{Path(__file__).parent / 'noop'}")
    folder = write_tiny_llama(tmp_path, max_position=1024)
    config = EngineConfig(
        model=str(folder), kv_cache_memory_bytes=1 << 26, threads=1, num_speculative_tokens=4
    )
    peer = Peer()
    try:
        peer.send(wire.Configure(config))
        peer.send(wire.Add((canary(peer.read(wire.Hello)),)))
        (answer,) = peer.completions(1).values()
        assert answer.outputs[0].token_ids == (EOS_TOKEN_ID,) * MAX_TOKENS
        peer.send(wire.Stop())
        assert peer.ends() == 0
    finally:
        peer.close()
