"""Report: what was measured, as a file and as a short table.

Owns the columns and the name of the file. Knows no measurement beyond the names of its figures.
"""

from __future__ import annotations

import datetime
import json
import re
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "results"


def default_path(device: str, today: datetime.date) -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return RESULTS / f"gpu-{slug}-{today.isoformat()}.json"


def write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def table(result: dict[str, Any]) -> str:
    """All sections, a line or a few each."""
    lines: list[str] = []
    for name, found in result["sections"].items():
        lines += _LINES.get(name, _engine)(name, found)
        lines += [f"{name:<9} {key}: {found[key]}" for key in ("error", "cut") if found.get(key)]
    return "\n".join(lines)


def short(result: dict[str, Any]) -> dict[str, Any]:
    """The figures that one quotes, for one line of JSON."""
    sections = result["sections"]
    kept = ("output_tok_s", "roofline_share", "gpu_busy", "error", "cut")
    figures: dict[str, Any] = {
        "machine": result["machine"].get("device"),
        "commit": result["machine"].get("commit"),
    }
    for name, found in sections.items():
        if name == "attention":
            figures[name] = {
                case["case"]: [case["us"], case["sdpa_us"], case["flex_us"]] for case in _cases(found)
            }
        elif name == "shared":
            figures[name] = {
                part: _only(found[part], kept) for part in ("cached", "uncached") if part in found
            }
            figures[name] |= _only(found, ("ratio", "error", "cut"))
        elif name == "quantised":
            figures[name] = _only(found, ("bf16", "int4", "fp8", "fp8_blocks", "error", "cut"))
        elif name == "experts":
            figures[name] = _only(found, ("mixed", "one_by_one", "ratio", "error", "cut"))
        elif name == "peer":
            figures[name] = _only(found, ("ours", "theirs", "ratio", "error", "cut"))
        else:
            figures[name] = _only(
                found, (*kept, "copy_gb_s", "product_tflop_s", "passed", "failed", "ideal_share", "cost")
            )
    return figures


def _only(found: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: found[name] for name in names if name in found}


def _cases(found: dict[str, Any]) -> list[dict[str, Any]]:
    return list(found.get("cases", ()))


def _ceilings(name: str, found: dict[str, Any]) -> list[str]:
    return [f"{name:<9} copy {found.get('copy_gb_s')} GB/s, product {found.get('product_tflop_s')} TFLOP/s"]


def _suite(name: str, found: dict[str, Any]) -> list[str]:
    return [
        f"{name:<9} {found.get('passed')} passed, {found.get('failed')} failed",
        *found.get("failures", ()),
    ]


def _attention(name: str, found: dict[str, Any]) -> list[str]:
    lines = [
        f"{name:<35} {'ours us':>9} {'sdpa us':>9} {'flex us':>9} {'of copy':>8} {'of prod':>8} {'error':>9}"
    ]
    for case in _cases(found):
        lines.append(
            f"{case['case']:<35} {_number(case['us']):>9} {_number(case['sdpa_us']):>9} {_number(case['flex_us']):>9}"
            f" {case['copy_share']:>8.1%} {case['product_share']:>8.1%} {_number(case.get('sdpa_error')):>9}"
        )
        if case["flex_us"] is None:
            lines.append(f"  flex: {case.get('flex_why')}")
    return lines


def _tiles(name: str, found: dict[str, Any]) -> list[str]:
    lines = []
    for case in _cases(found):
        times = {label: us for label, us in case["us"].items() if us is not None}
        if not times:
            continue
        best = min(times, key=lambda label: times[label])
        own = _number(times.get(case["own"]))
        lines.append(
            f"{name:<9} {case['case']:<35} {case['own']}: {own} us; best {best}: {times[best]:.1f} us"
        )
    return lines


def _engine(name: str, found: dict[str, Any]) -> list[str]:
    if "output_tok_s" not in found:
        return [f"{name:<9} nothing measured"]
    busy = found.get("gpu_busy")
    lines = [
        f"{name:<9} {found['output_tok_s']:>9.1f} output tok/s, {_number(found['total_tok_s'])} total, "
        f"{found['seconds']:.2f} s, {found['steps']} steps, {_share(found.get('roofline_share'))} of the roofline"
        f" ({_share(found.get('ideal_share'))} of the ideal), GPU busy {_share(busy)}"
    ]
    if "ms_per_step" in found:
        lines.append(
            f"  decode of {found['decoding_rows']} rows: {found['ms_per_step']} ms a step, "
            f"{found['launches_per_step']} launches"
        )
    lines += [f"  {top['share']:>6.1%} {top['count']:>6} {top['kernel']}" for top in found.get("top", ())]
    return lines


def _shared(name: str, found: dict[str, Any]) -> list[str]:
    parts = [
        line for part in ("cached", "uncached") if part in found for line in _engine(part, found[part])[:2]
    ]
    return [f"{name:<9} ratio {found.get('ratio')}", *parts]


def _peer(name: str, found: dict[str, Any]) -> list[str]:
    return [
        f"{name:<9} ours {found.get('ours')}, transformers {found.get('theirs')}, ratio {found.get('ratio')}"
    ]


def _invariant(name: str, found: dict[str, Any]) -> list[str]:
    return [f"{name:<9} cost {_share(found.get('cost'))}, seconds {found.get('seconds')}"]


def _quantised(name: str, found: dict[str, Any]) -> list[str]:
    return [
        f"{name:<9} {form:<10} {rows}: {one['output_tok_s']:>9.1f} output tok/s with {one['rows']} rows, "
        f"{_share(one['roofline_share'])} of the roofline, {found[form]['weight_bytes'] / 1e9:.2f} GB in layers"
        for form in ("bf16", "int4", "fp8", "fp8_blocks")
        for rows, one in found.get(form, {}).items()
        if rows != "weight_bytes"
    ]


def _experts(name: str, found: dict[str, Any]) -> list[str]:
    return [
        f"{name:<9} {way:<10} {rows}: {one['output_tok_s']:>9.1f} output tok/s with {one['rows']} rows, "
        f"weights at {_share(one['copy_share'])} of the copy rate"
        for way in ("mixed", "one_by_one")
        for rows, one in found.get(way, {}).items()
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}" if abs(value) < 1 else f"{value:.1f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


_LINES = {
    "ceilings": _ceilings,
    "suite": _suite,
    "attention": _attention,
    "tiles": _tiles,
    "shared": _shared,
    "invariant": _invariant,
    "quantised": _quantised,
    "experts": _experts,
    "peer": _peer,
}
