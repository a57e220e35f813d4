"""A comparison as Markdown: one table per mode, ratios to the first layout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hp_plugin.compare.entries.entrant import FUNCTION_MARK
from hp_plugin.compare.entries.suites import context_of
from hp_plugin.compare.report.planner_columns import HEAD as PREDICTED_HEAD
from hp_plugin.compare.report.planner_columns import has_predictions, prediction_rows, winners

HEAD = (
    "layout",
    "tokens/s (min-max)",
    "ratio",
    "TPOT ms",
    "ratio",
    "sent B/token",
    "closed form",
    "PP wait",
    "peak MiB",
)


DECODE_HEAD = (
    "layout",
    "tokens/s (min-max)",
    "ratio",
    "TPOT ms",
    "ratio",
    "ms per token",
    "cache MiB",
    "sent B/token",
    "closed form",
    "peak MiB",
)
"""TPOT is the part in collectives; the whole time of a step, which serving calls so, stands beside it."""


def head(mode: str) -> tuple[str, ...]:
    """The columns of a mode's table."""
    return HEAD if context_of(mode) is None else DECODE_HEAD


def markdown_report(report: dict[str, Any]) -> str:
    """All of a report but its raw samples."""
    partial = "" if report["complete"] else " (partial: the run did not end)"
    lines = [f"# {report['model']}{partial}", "", f"{described(report)}", ""]
    for mode, layouts in report["modes"].items():
        if not layouts:
            continue
        behind, columns = context_of(mode), head(mode)
        title = mode if behind is None else f"decode, {behind} tokens cached"
        lines += [f"## {title}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        lines += [f"| {' | '.join(cells)} |" for cells in rows(layouts)]
        refused = report["not_possible"]
        lines += [f"| {name} | stock: not possible |{' |' * (len(columns) - 2)}" for name in refused]
        lines += ["", *(f"{name}: {words}" for name, words in refused.items())]
        lines += [f"{FUNCTION_MARK}: another function than the model's attention"] if _marked(layouts) else []
        lines.append("")
        if has_predictions(layouts):
            lines += [*_predictions(layouts), ""]
        lines += [*_by_group(layouts), ""]
    return "\n".join([*lines, *_source(report)]).rstrip()


def described(report: dict[str, Any]) -> str:
    """The model, its scale, and the machine, named as what it is."""
    options, machine = report["options"], report["machine"]
    where = (
        f"{machine['ranks']} ranks on {machine['gpus']} x {machine['gpu']} per node, NCCL"
        if machine["gpu"]
        else f"{machine['ranks']} processes on {machine['cpus']} CPU cores, gloo over loopback: no GPU, no network"
    )
    experts = f", {options['num_experts']} experts top-{options['moe_router_topk']}" if options["num_experts"] else ""
    precision = "fp16" if options["fp16"] else "bf16" if options["bf16"] else "fp32"
    backend = options.get("attention_backend", "auto")  # which earlier reports do not say
    core = "" if backend == "auto" else f", --attention-backend {backend}"
    return (
        f"{options['num_layers']} layers, {options['num_attention_heads']} heads, {options['query_groups']} key/value "
        f"heads, hidden {options['hidden_size']}{experts}; {options['global_batch_size']} sequences of "
        f"{options['seq_length']} per step; {precision}{core}. Scale: {report['scale']}. Measured with {where}."
    )


def rows(layouts: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """The cells of one mode's table, a row per layout."""
    base = next(iter(layouts.values()))
    for name, one in layouts.items():
        rate, tpot = one["tokens_per_s"], one["tpot_ms"]["median"]
        formula, peak = sum(one["closed_form_bytes_per_token"].values()), one["peak_bytes"]
        waited = base["tpot_ms"]["median"]
        sent = (f"{sum(one['sent_bytes_per_token'].values()):,.0f}", f"{formula:,.0f}")
        others: tuple[str, ...]
        if one.get("cache_bytes") is None:
            others = (*sent, f"{one['pipeline_wait_share']['median']:.0%}")
        else:
            others = (f"{1e3 * one['step_s']['median']:,.2f}", f"{one['cache_bytes'] / 2**20:,.1f}", *sent)
        yield (
            name if one["exact"] else f"{name} {FUNCTION_MARK}",
            f"{rate['median']:,.0f} ({rate['min']:,.0f}-{rate['max']:,.0f})",
            f"{rate['median'] / base['tokens_per_s']['median']:.2f}",
            f"{tpot:.3f}",
            f"{tpot / waited:.2f}" if waited else "-",
            *others,
            "-" if peak is None else f"{peak / 2**20:,.0f}",
        )


def _marked(layouts: dict[str, Any]) -> bool:
    return any(not one["exact"] for one in layouts.values())


def _predictions(layouts: dict[str, Any]) -> Iterator[str]:
    """What `hp-plugin plan` says of the same layouts with this machine described as hardware."""
    yield "Predicted from rates of this machine alone (`machine.json`):"
    yield ""
    yield f"| {' | '.join(PREDICTED_HEAD)} |"
    yield "|---" * len(PREDICTED_HEAD) + "|"
    for cells in prediction_rows(layouts):
        yield f"| {' | '.join(cells)} |"
    yield ""
    yield winners(layouts)


def _by_group(layouts: dict[str, Any]) -> Iterator[str]:
    """TPOT and bytes by group and collective."""
    yield "| layout | group/collective | TPOT ms | sent B/token | closed form |"
    yield "|---|---|---|---|---|"
    for name, one in layouts.items():
        measured, formula = one["sent_bytes_per_token"], one["closed_form_bytes_per_token"]
        for key in sorted({*one["tpot_ms_by_group"], *formula}):
            cells = (one["tpot_ms_by_group"].get(key, 0.0), measured.get(key, 0.0), formula.get(key, 0.0))
            yield f"| {name} | {key} | {cells[0]:.4f} | {cells[1]:,.1f} | {cells[2]:,.1f} |"


def _source(report: dict[str, Any]) -> Iterator[str]:
    """The source experiments' figures, beside the ratios measured here."""
    if report["reported"] is None:
        return
    base, grid = report["reported"].values()
    yield "## What the source experiments report"
    yield ""
    yield (
        f"16 H100, full size: {grid['tokens_per_s'] / base['tokens_per_s']:.3f} times the tokens/s of TP=8·PP=2 "
        f"({grid['tokens_per_s']:,} against {base['tokens_per_s']:,}) and {grid['tpot_ms'] / base['tpot_ms']:.3f} "
        f"times its TPOT ({grid['tpot_ms']} against {base['tpot_ms']} ms). Measured here:"
    )
    yield ""
    for mode, layouts in report["modes"].items():
        grids = {name: one for name, one in layouts.items() if name.startswith("grid") and one["exact"]}
        if not grids:
            continue
        first = next(iter(layouts.values()))
        best = max(grids, key=lambda name: grids[name]["tokens_per_s"]["median"])
        rate = grids[best]["tokens_per_s"]["median"] / first["tokens_per_s"]["median"]
        tpot = grids[best]["tpot_ms"]["median"] / first["tpot_ms"]["median"] if first["tpot_ms"]["median"] else 0.0
        yield f"- {mode}: {rate:.3f} times the tokens/s, {tpot:.3f} times the TPOT ({best}, the fastest exact grid)"
