"""Report: the comparisons as a table, and on which machine they were made.

Owns the columns. Knows no measurement beyond the names of its figures.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

HEAD: Final = (
    "workload",
    "peer",
    "pairs",
    "ours tok/s",
    "peer tok/s",
    "ratio",
    "ours ready",
    "peer ready",
    "ours dtype",
    "peer dtype",
)
BF16_FLAGS: Final = {"avx512_bf16", "amx_bf16"}


def machine(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, Any]:
    """What the figures depend on. `bf16_instructions` decides what a product in bfloat16 costs; None: not known."""
    try:
        text = cpuinfo.read_text()
    except OSError:
        text = ""
    pairs = (line.partition(":") for line in text.splitlines())
    fields = {name.strip(): value.strip() for name, _, value in pairs}
    flags = set(fields.get("flags", "").split())
    return {
        "cpu": fields.get("model name", platform.processor()),
        "cores": os.cpu_count(),
        "avx512": "avx512f" in flags if flags else None,
        "bf16_instructions": bool(flags & BF16_FLAGS) if flags else None,
        "load_before": round(os.getloadavg()[1], 2),
        "python": platform.python_version(),
    }


def table(figures: Sequence[dict[str, Any]]) -> str:
    """A line for every comparison, and the reasons and notes below."""
    rows: list[tuple[str, ...]] = [HEAD]
    remarks: list[str] = []
    for found in figures:
        rows.append(_row(found))
        where = f"{found['workload']}, {found['peer']}"
        if "failed" in found:
            remarks.append(f"{where}: {found['failed']}")
        for name, side in (("ours", "ours"), (found["peer"], "theirs")):
            remarks += [f"{name}: {note}" for note in found.get(side, {}).get("notes", ())]
    widths = [max(len(row[k]) for row in rows) for k in range(len(HEAD))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return "\n".join(lines + list(dict.fromkeys(remarks)))


def _row(found: dict[str, Any]) -> tuple[str, ...]:
    first = (found["workload"], found["peer"], str(found["pairs"]))
    if not found["pairs"]:
        return (*first, *("-" for _ in HEAD[3:]))
    ours, theirs = found["ours"], found["theirs"]
    return (
        *first,
        f"{ours['output_tok_s']:.1f}",
        f"{theirs['output_tok_s']:.1f}",
        f"{found['ratio']:.2f}",
        f"{ours['start_up_seconds']:.1f} s",
        f"{theirs['start_up_seconds']:.1f} s",
        ours["dtype"],
        theirs["dtype"],
    )
