"""How fast a checkpoint is loaded, beside a plain read of the same file and transformers' from_pretrained.

`python -m tests.bench.bench_loading [--gigabytes G] [--pairs N]`

Writes a Llama of so many bytes in bfloat16, in two shards, under a temporary folder; then, alternating, reads the
files as they are, loads them with `load_weights` and `Decoder.prepare`, and with transformers; each cold (the kernel
is asked to forget the files, POSIX_FADV_DONTNEED) and warm. MB/s of the files' bytes. transformers maps them and
copies nothing on a CPU, so one value of every page is read there; ours copies, as it merges q, k, v and gate, up.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from engine.checkpoint import Checkpoint
from engine.model import Decoder
from engine.weights import load_weights
from kernels.reference import KERNELS

HIDDEN, INNER, VOCAB = 2048, 5632, 32_000


def write_checkpoint(folder: Path, gigabytes: float) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    per_layer = 2 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER)
    layers = max(1, round((gigabytes * 1e9 - 4 * VOCAB * HIDDEN) / per_layer))
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        vocab_size=VOCAB,
        num_hidden_layers=layers,
        num_attention_heads=16,
        dtype="bfloat16",
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder, max_shard_size=f"{max(1, round(gigabytes * 600))}MB")
    os.sync()  # only written pages can be forgotten


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def forget(folder: Path) -> None:
    for path in files(folder):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_plainly(folder: Path) -> None:
    buffer = bytearray(16 * 2**20)
    for path in files(folder):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def load_ours(folder: Path) -> None:
    checkpoint = Checkpoint.open(str(folder))
    with torch.inference_mode():
        decoder = Decoder(checkpoint.config, KERNELS, dtype=torch.bfloat16, device="cpu")
        load_weights(decoder, checkpoint)
        decoder.prepare(2048)


def load_theirs(folder: Path) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for parameter in model.parameters():  # one value of every page: what is only mapped has not been read
        parameter.detach().view(torch.int16).flatten()[::2048].sum()


WAYS: dict[str, Callable[[Path], None]] = {
    "plain read": read_plainly,
    "ours": load_ours,
    "transformers": load_theirs,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.5)
    parser.add_argument("--pairs", type=int, default=3)
    args = parser.parse_args()
    rates: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(folder, args.gigabytes)
        num_bytes = sum(path.stat().st_size for path in files(folder))
        load_theirs(folder)  # imports are not measured
        for _ in range(args.pairs):
            for way, load in WAYS.items():
                forget(folder)
                for kind in ("cold", "warm"):
                    started = time.perf_counter()
                    load(folder)
                    rate = num_bytes / 1e6 / (time.perf_counter() - started)
                    rates.setdefault(f"{way}, {kind}", []).append(rate)
                    print(f"{way}, {kind}: {rate:.0f} MB/s", flush=True)
    result: dict[str, object] = {way: round(statistics.median(found)) for way, found in rates.items()}
    print(json.dumps({"unit": "MB/s, median", "mb": round(num_bytes / 1e6), **result} | versions()))


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__}


if __name__ == "__main__":
    main()
