"""The benchmark of one GPU: `python -m tests.bench.gpu [SECTION ...] [--out FILE] [--share F] [--limit SECONDS]`.

Sections: ceilings, attention, nano, eight, shared, invariant, peer; and suite, quantised, experts and tiles, which
have to be named. Each runs in a process of its own (`section`). The ceilings, which others are measured against,
always come first. The result is a JSON file, written anew after every section; a table and one line of JSON come
last. `--device cpu --tiny` runs all of it on a CPU, to find faults.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.bench.gpu import report
from tests.bench.gpu.section import DEFAULT, SECTIONS
from tests.bench.gpu.setting import Setting

LIMIT_SECONDS, LIMIT_OF_LONG = 340.0, 450.0  # the second with a section of LONG
LONG = ("suite", "tiles")
SPARE_SECONDS = 12.0  # a section that has to stop by itself may take so long to do it
LEAST_SECONDS = 20.0  # less is not worth a start


def main() -> int:
    args = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a section does not outlive this process
    names = [name for name in SECTIONS if name == "ceilings" or name in (args.sections or DEFAULT)]
    limit = args.limit or (LIMIT_SECONDS if set(LONG).isdisjoint(names) else LIMIT_OF_LONG)
    end = time.monotonic() + limit
    setting = Setting(device=args.device, tiny=args.tiny, share=args.share, seconds=0)
    today = datetime.datetime.now(datetime.UTC)
    result: dict[str, Any] = {
        "date": today.isoformat(timespec="seconds"),
        "machine": {},
        "setting": {"device": args.device, "tiny": args.tiny, "share": args.share, "limit": limit},
        "sections": {},
    }
    path = args.out or (Path(tempfile.gettempdir()) / "gpu-tiny.json" if args.tiny else None)
    for name in names:
        left = end - time.monotonic()
        start = time.monotonic()
        if left < LEAST_SECONDS:
            found: dict[str, Any] = {"error": f"not begun: the limit of {limit:.0f} s was near"}
        else:
            print(f"--- {name} ({left:.0f} s left)", flush=True)
            found = run_section(name, setting, min(left, SECTIONS[name].seconds))
        if name == "ceilings":
            result["machine"] = found.pop("machine", {})
            if "product_tflop_s" in found:
                setting = replace(
                    setting,
                    copy_rate=found["copy_gb_s"] * 1e9,
                    product_rate=found["product_tflop_s"] * 1e12,
                )
        result["sections"][name] = {**found, "section_seconds": round(time.monotonic() - start, 1)}
        path = path or report.default_path(result["machine"].get("device") or args.device, today.date())
        report.write(path, result)
    print(f"\n{result['machine']}\n{report.table(result)}\nwritten to {path}")
    print(json.dumps(report.short(result)))
    return 1 if any("error" in found for found in result["sections"].values()) else 0


def run_section(name: str, setting: Setting, seconds: float) -> dict[str, Any]:
    """What the section has found within `seconds`, after which it is killed."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        own = replace(setting, seconds=max(5.0, seconds - SPARE_SECONDS))
        command = [sys.executable, "-m", "tests.bench.gpu.section", name, own.text(), str(file)]
        child = subprocess.Popen(command, start_new_session=True)
        why = None
        try:
            status = child.wait(seconds)
            if status not in (0, 1):
                why = f"the process ended with status {status}"
        except subprocess.TimeoutExpired:
            why = f"killed after {seconds:.0f} s"
        finally:  # compilers' own processes too
            try:
                os.killpg(child.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            child.wait()
        found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        if why:
            found["error"] = why
        return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes: finds faults, measures nothing")
    parser.add_argument("--share", type=float, default=1.0, help="of the output lengths of workloads")
    parser.add_argument("--limit", type=float, default=None, help="seconds for everything")
    parser.add_argument("--out", type=Path, default=None, help="the JSON file; else in tests/bench/results/")
    args = parser.parse_args()
    if unknown := set(args.sections) - set(SECTIONS):
        parser.error(f"no such section: {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    return args


if __name__ == "__main__":
    sys.exit(main())
