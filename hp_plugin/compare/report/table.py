"""A comparison on the terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from hp_plugin.compare.entries.entrant import FUNCTION_MARK
from hp_plugin.compare.report.markdown import described, head, rows
from hp_plugin.compare.report.planner_columns import HEAD as PREDICTED_HEAD
from hp_plugin.compare.report.planner_columns import has_predictions, prediction_rows, winners

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_WIDTH = 150
"""Columns of a log, which has no width of its own."""


def show(report: dict[str, Any]) -> None:
    """Prints a table per mode, the source's reported ratios under it where the model is theirs."""
    # Here, since importing rich draws random numbers.
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    console.print(f"\n[bold]{report['model']}[/bold]: {described(report)}", highlight=False)
    for mode, layouts in report["modes"].items():
        if not layouts:
            continue
        title = mode if report["complete"] else f"{mode} (partial: the run did not end)"
        table = _table(title, head(mode))
        for cells in rows(layouts):
            table.add_row(*cells)
        for name in report["not_possible"]:
            table.add_row(name, "stock: not possible")
        console.print(table)
        if has_predictions(layouts):
            _show_predictions(console, layouts)
        if any(not one["exact"] for one in layouts.values()):
            console.print(f"{FUNCTION_MARK} another function than the model's attention (docs/compare.md)")
    for name, words in report["not_possible"].items():
        console.print(f"{name}: stock: not possible: {words}", markup=False)
    if report["reported"]:
        base, grid = report["reported"].values()
        rate, tpot = grid["tokens_per_s"] / base["tokens_per_s"], grid["tpot_ms"] / base["tpot_ms"]
        console.print(
            f"the source experiments report, on 16 H100 at full size: {rate:.3f} times the tokens/s and {tpot:.3f} "
            "times the TPOT of TP=8·PP=2",
            highlight=False,
        )


def _show_predictions(console: Console, layouts: dict[str, Any]) -> None:
    table = _table("predicted from rates of this machine alone", PREDICTED_HEAD)
    for cells in prediction_rows(layouts):
        table.add_row(*cells)
    console.print(table)
    console.print(winners(layouts), markup=False, highlight=False)


def _table(title: str, heads: tuple[str, ...]) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for number, words in enumerate(heads):
        table.add_column(words, justify="right" if number else "left")
    return table
