"""Puts the tables of comparisons into a Markdown page, between two markers that stay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hp_plugin.compare.entries.catalogue import MODELS
from hp_plugin.compare.entries.entrant import FUNCTION_MARK
from hp_plugin.compare.report.markdown import HEAD, described, rows

BEGIN, END = "<!-- compare: begin -->", "<!-- compare: end -->"


def check_page(page: Path) -> None:
    """Refuses a page without room for tables.

    Raises:
        ValueError: no such file, or not both markers in it, in this order.
    """
    if not page.is_file():
        raise ValueError(f"--into {page}: no such file")
    text = page.read_text(encoding="utf-8")
    if not -1 < text.find(BEGIN) < text.find(END):
        raise ValueError(f"--into {page}: needs a line {BEGIN} and, below it, a line {END}")


def load_reports(folder: Path) -> list[dict[str, Any]]:
    """The complete reports of all models compared under one `--out`, in the catalogue's order."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*/report.json"))]
    order = list(MODELS)
    complete = [report for report in found if report["complete"]]
    return sorted(complete, key=lambda report: order.index(report["model"]) if report["model"] in order else len(order))


def put_into(page: Path, reports: list[dict[str, Any]]) -> None:
    """Replaces what is between the markers; the page is written whole or not at all."""
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    new = page.with_name(page.name + ".new")
    new.write_text(f"{before}{BEGIN}\n{tables(reports)}\n{END}{after}", encoding="utf-8")
    new.replace(page)


def tables(reports: list[dict[str, Any]]) -> str:
    """One short table per model and mode."""
    lines: list[str] = []
    for report in reports:
        lines += ["", f"**{report['model']}**: {described(report)}"]
        for mode, layouts in report["modes"].items():
            lines += ["", f"| {mode} | {' | '.join(HEAD[1:5])} |", "|---" * 5 + "|"]
            lines += [f"| {' | '.join(cells[:5])} |" for cells in rows(layouts)]
            lines += [f"| {name} | stock: not possible | | | |" for name in report["not_possible"]]
        if report["reported"] is not None:
            base, grid = report["reported"].values()
            rate, tpot = grid["tokens_per_s"] / base["tokens_per_s"], grid["tpot_ms"] / base["tpot_ms"]
            lines += [
                "",
                f"The source experiments report {rate:.3f} times the tokens/s and {tpot:.3f} times the TPOT of "
                "TP=8·PP=2 for their grid on 16 H100.",
            ]
    if any(not one["exact"] for report in reports for layouts in report["modes"].values() for one in layouts.values()):
        lines += ["", f"{FUNCTION_MARK}: another function than the model's attention."]
    return "\n".join([*lines, ""])
