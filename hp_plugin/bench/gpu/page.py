"""on_gpu.json as one page of Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from hp_plugin.bench.gpu.machine_file import LINKS

_MEASURED = "this device"


def markdown(found: dict[str, Any]) -> str:
    """Everything that the stages found, or why they did not."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
    where = found["device"] or "a CPU: no GPU"
    lines = [f"# {where}" + (" (rehearsal: tiny sizes, no figure means anything)" if found["dry_run"] else "")]
    lines += ["", f"{versions}; {found['system']}.", "", "| stage | ended | seconds |", "|---|---|---|"]
    for name, stage in found["stages"].items():
        ended = {0: "well", None: "cut off"}.get(stage["status"], f"status {stage['status']}")
        lines.append(f"| {name} | {ended}, {stage['log']} | {stage['seconds']:.0f} |")
    parts = {"wide heads": _heads, "four ranks": _ranks, "shard": _shard, "tests": _tests}
    for name, part in parts.items():
        result = found["stages"].get(name, {}).get("found")
        if result is not None:
            lines += ["", *part(result, found)]
    return "\n".join(lines) + "\n"


def _tests(result: dict[str, Any], found: dict[str, Any]) -> Iterator[str]:
    yield "## tests/gpu"
    yield ""
    yield ", ".join(f"{count} {name}" for name, count in result.items() if name != "which_failed") + "."
    yield from (f"* {name}" for name in result["which_failed"])


def _heads(result: dict[str, Any], found: dict[str, Any]) -> Iterator[str]:
    yield "## Core attention: torch's fused kernels against Megatron-Core's unfused local attention"
    yield ""
    yield "| shape | | unfused ms | fused ms | ratio | unfused MiB | fused MiB |"
    yield "|---|---|---|---|---|---|---|"
    for name, one in result.items():
        shape = one["shape"]
        window = f", window {shape['window']}" if shape["window"] is not None else ""
        said = (
            f"{name}: s={shape['seq_length']} h={shape['num_attention_heads']} g={shape['num_query_groups']} "
            f"d={shape['kv_channels']}{window}, {shape['dtype']}"
        )
        for mode in ("forward", "training"):
            times = [statistics.median(one["times_s"][f"{mode}/{core}"]) for core in ("unfused", "fused")]
            peaks = [one["peak_bytes"][f"{mode}/{core}"] for core in ("unfused", "fused")]
            memory = " | ".join("-" if peak is None else f"{peak / 2**20:,.0f}" for peak in peaks)
            timed = f"{times[0] * 1e3:.2f} | {times[1] * 1e3:.2f} | {times[1] / times[0]:.2f}"
            yield f"| {said} | {mode} | {timed} | {memory} |"
            said = ""


def _ranks(result: dict[str, Any], found: dict[str, Any]) -> Iterator[str]:
    one = found["stages"].get("one rank", {}).get("found", {}).get("one rank")
    yield "## Four ranks on the device"
    yield ""
    yield "| layout | losses | furthest from one rank | peak MiB of a rank |"
    yield "|---|---|---|---|"
    for name, run in {**({"one rank": one} if one else {}), **result}.items():
        losses = ", ".join("-" if loss is None else f"{loss:.6f}" for loss in run["losses"])
        far = "-"
        if one and None not in run["losses"]:
            far = f"{max(abs(a - b) for a, b in zip(run['losses'], one['losses'], strict=True)):.1e}"
        peak = "-" if run["peak_bytes"] is None else f"{run['peak_bytes'] / 2**20:,.0f}"
        yield f"| {name} | {losses} | {far} | {peak} |"


def _shard(result: dict[str, Any], found: dict[str, Any]) -> Iterator[str]:
    length, samples = result["tokens"]
    copy = result["exchange copy"]
    adam = result["optimizer"]
    yield "## Shard replay"
    yield ""
    yield (
        f"One rank of 16, one layer, forward and backward, {samples} sequences of {length}, {result['dtype']}. "
        "Measured: its kernels one by one on this device. Planned: the planner's times of the same kernels, from "
        f"machine.json (tables of this device) and from {LINKS} (published tables). Tokens/s: what the planner "
        f"predicts for 16 GPUs from machine.json, with the published collectives and network of {LINKS}: not measured."
    )
    yield ""
    yield (
        f"Adam: {adam['parameters']:,} parameters in {adam['seconds'] * 1e3:.2f} ms. Copies of an exchange "
        f"{copy['shape']}: {copy['bytes_per_s'] / 1e9:,.0f} GB/s."
    )
    for model, rows in result["rows"].items():
        yield ""
        planned_by = f"planned ms | {LINKS} ms"
        yield f"| {model} | products ms | attention ms | memory ms | together ms | {planned_by} | tokens/s predicted |"
        yield "|---|---|---|---|---|---|---|---|"
        for row in rows:
            if "measured_s" not in row:
                yield f"| {row['layout']} | refused: {row['refused']} |" + " |" * 6
                continue
            kinds = {
                kind: sum(one.get(kind, 0.0) for one in row["measured_s"].values()) * 1e3
                for kind in ("products", "attention", "memory")
            }
            planned = [sum(one.values()) * 1e3 for one in row["planned_s"].values()]
            rate = row["tokens_per_s"][_MEASURED]
            yield (
                f"| {row['layout']} | {' | '.join(f'{ms:.2f}' for ms in kinds.values())} | {sum(kinds.values()):.2f} | "
                f"{' | '.join(f'{ms:.2f}' for ms in planned)} | {'-' if rate is None else f'{rate:,.0f}'} |"
            )
