"""Ours against OpenVINO GenAI, vLLM on CPU and transformers, on the same token ids and the same weights.

`python -m tests.bench.peers [WORKLOAD ...] [--pairs N] [--peers NAME ...] [--part N] [--dtype TYPE] [--guessed N]
[--model PATH] [--limit SECONDS] [--out FILE]`

Workloads: mixed, shared, long, single (`workload`); all by default, and all peers. Every run is a process of its
own, in an environment of its own, which is made on the first use in `NIGHTPRESS_PEERS_DIR` (else
~/.cache/nightpress/peers: about 5 GB); so are the weights and the workload files. Ours and the peer take turns. Each
is warmed up outside of the measured time. `--part N` runs the first N requests of a workload only, for a slow
machine; such figures are comparable with nothing but each other. A peer that cannot run is told with its reason. A
table comes last, and one line of JSON.

Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.bench.peers import report
from tests.bench.peers.comparison import Comparison, Who, compared
from tests.bench.peers.once import Unavailable, cache_folder
from tests.bench.peers.side import PEERS, Run, Side, ours
from tests.bench.peers.weights import bundled, vocab_size
from tests.bench.peers.workload import WORKLOADS, Workload, kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What all comparisons of one call share. `sides`: the peers that are ready; `missing`: why others are not."""

    ours: Side
    sides: dict[str, Side]
    missing: dict[str, str]
    workloads: dict[str, Path]  # files
    pairs: int
    limit: float  # seconds of one run
    cwd: Path  # without our packages in it: an engine must not meet a module of ours by its name
    done: list[Comparison] = field(default_factory=list)

    def run(self) -> None:
        for workload in self.workloads:
            for peer in (*self.sides, *self.missing):
                self.done.append(self._compared(workload, peer))

    def _compared(self, workload: str, peer: str) -> Comparison:
        if peer in self.missing:
            return Comparison(workload=workload, peer=peer, failed=f"{peer}: {self.missing[peer]}")

        def run(who: Who) -> Run:
            side = self.ours if who == "ours" else self.sides[peer]
            made = side.run(self.workloads[workload], cwd=self.cwd, timeout=self.limit)
            print(
                f"{workload}: {side.name} {made.tokens_per_second:.1f} tok/s ({made.seconds:.1f} s, ready after "
                f"{made.start_up_seconds:.1f} s)",
                flush=True,
            )
            return made

        return compared(workload, peer, self.pairs, run)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=", ".join(WORKLOADS))
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--part", type=int, default=None, help="run only so many requests of each workload")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32", "auto"], default="bfloat16", help="of ours"
    )
    parser.add_argument("--guessed", type=int, default=None, help="num_speculative_tokens of ours; 0: none")
    parser.add_argument("--peer-dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--model", type=Path, default=None, help="a folder of safetensors, or a GGUF file")
    parser.add_argument("--limit", type=float, default=1200.0, help="seconds of one run, start included")
    parser.add_argument("--out", type=Path, default=None, help="a file for the line of JSON")
    args = parser.parse_args()
    if unknown := set(args.workloads) - set(WORKLOADS):
        parser.error(f"no such workload: {', '.join(sorted(unknown))}; there are {', '.join(WORKLOADS)}")
    if args.pairs < 1 or (args.part is not None and args.part < 1):
        parser.error("--pairs and --part begin at 1")
    return args


def main() -> int:
    """0, also when a peer could not run; 1 when ours could not."""
    args = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a child does not outlive this process
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    machine = report.machine()
    try:
        source = args.model.resolve() if args.model else bundled()
        mine = ours(source, cache, args.dtype, args.guessed)
    except Unavailable as reason:
        sys.exit(str(reason))
    sides: dict[str, Side] = {}
    missing: dict[str, str] = {}
    for name in args.peers:
        try:
            sides[name] = PEERS[name].side(name, source, cache, args.peer_dtype)
        except Unavailable as reason:
            missing[name] = str(reason)
    with tempfile.TemporaryDirectory(prefix="nightpress-bench-") as folder:
        files: dict[str, Path] = {}
        parts: dict[str, Workload] = {}
        for name in args.workloads or WORKLOADS:
            size = vocab_size(mine.model)
            parts[name] = kept(name, size, cache / "workloads" / str(size)).part(args.part)
            files[name] = Path(folder) / f"{name}.json"
            parts[name].write(files[name])
        bench = Bench(
            ours=mine,
            sides=sides,
            missing=missing,
            workloads=files,
            pairs=args.pairs,
            limit=args.limit,
            cwd=cache,
        )
        bench.run()
    figures = [comparison.figures() for comparison in bench.done]
    result: dict[str, Any] = {
        "machine": machine,
        "model": source.name,
        "part": args.part,
        "pairs": args.pairs,
        "workloads": {
            name: {
                "requests": len(w.requests),
                "prompt_tokens": w.num_prompt_tokens,
                "new_tokens": w.num_new_tokens,
            }
            for name, w in parts.items()
        },
        "comparisons": figures,
    }
    print(report.table(figures))
    if args.out:
        args.out.write_text(json.dumps(result) + "\n")
    print(json.dumps(result))
    return int(any((comparison.failed or "").startswith("ours:") for comparison in bench.done))


if __name__ == "__main__":
    sys.exit(main())
