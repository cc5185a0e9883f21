"""How many nodes the CUDA graphs of one step of decoding have, and which: counted on a CPU, in triton's interpreter.

`python -m tests.bench.launches [--list]`

A tiny model of Qwen3-0.6B's kind, with one layer and with two: the second tells what a layer takes. Draws of greedy
rows, which are those by temperature, of filtered and of penalised ones, and with logprobs. The last line is JSON;
`--list` names every node before it, with the line of ours that asks for it. It says nothing of times.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

from tests.support.launches import GREEDY, step_launches

DRAWS = {
    "plain": GREEDY,
    "filtered": {"temperature": 1.0, "top_p": 0.9},
    "penalised": {"temperature": 1.0, "presence_penalty": 0.5},
    "scored": {"temperature": 1.0, "logprobs": 0},
}
LAYERS = 28  # of Qwen3-0.6B


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        one, two = (step_launches(Path(folder, str(layers)), layers=layers) for layers in (1, 2))
        found = {
            name: len(step_launches(Path(folder, name), layers=1, asked=asked))
            for name, asked in DRAWS.items()
        }
    if chosen.list:
        for launch in one:
            print(f"{launch.name:28} {launch.origin}")
    each = len(two) - len(one)
    besides = {name: count - each for name, count in found.items()}
    print(json.dumps({"a_layer": each, "besides": besides, "of_28_layers": besides["plain"] + LAYERS * each}))


if __name__ == "__main__":
    main()
