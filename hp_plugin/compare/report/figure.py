"""A comparison as a picture: tokens/s and TPOT as bars, the baseline left, ratios to it printed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hp_plugin.compare.entries.entrant import FUNCTION_MARK

_BASELINE, _OTHER, _LITERAL = "tab:gray", "tab:blue", "tab:orange"


def draw(report: dict[str, Any], path: Path) -> None:
    """Writes a PNG of every mode of a report, a row of two bar charts each.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    modes = {mode: layouts for mode, layouts in report["modes"].items() if layouts}
    count = max(len(layouts) for layouts in modes.values())
    figure, axes = plt.subplots(
        len(modes), 2, figsize=(max(9.0, 1.6 * count + 2), 4.2 * len(modes)), squeeze=False, layout="constrained"
    )
    for row, (mode, layouts) in zip(axes, modes.items(), strict=True):
        for plot, key, label in ((row[0], "tokens_per_s", "tokens/s"), (row[1], "tpot_ms", "TPOT (ms)")):
            _bars(plot, layouts, key, f"{mode}: {label}{_said(report, key)}")
    machine = report["machine"]
    where = f"{machine['gpus']} x {machine['gpu']}" if machine["gpu"] else f"{machine['cpus']} CPU cores, gloo"
    partial = "" if report["complete"] else ", PARTIAL"
    figure.suptitle(f"{report['model']} ({report['scale']}), {machine['ranks']} ranks on {where}{partial}", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bars(plot: Any, layouts: dict[str, Any], key: str, title: str) -> None:
    names, found = list(layouts), [one[key] for one in layouts.values()]
    medians = [one["median"] for one in found]
    spread = [[one["median"] - one["min"] for one in found], [one["max"] - one["median"] for one in found]]
    exact = [one["exact"] for one in layouts.values()]
    colors = [_BASELINE if at == 0 else _OTHER if exact[at] else _LITERAL for at in range(len(names))]
    bars = plot.bar(range(len(names)), medians, yerr=spread, color=colors, capsize=2)
    ratios = [f"{value / medians[0]:.2f}×" if medians[0] else "-" for value in medians]
    plot.bar_label(bars, ratios, fontsize=8, padding=2)
    marked = [name if is_exact else f"{name} {FUNCTION_MARK}" for name, is_exact in zip(names, exact, strict=True)]
    plot.set_xticks(
        range(len(names)), [name.replace("exchange=", "").replace(",", "\n") for name in marked], fontsize=6
    )
    plot.set_title(title, fontsize=9)
    plot.margins(y=0.15)


def _said(report: dict[str, Any], key: str) -> str:
    """The source's ratio, marked as such."""
    if report["reported"] is None:
        return ""
    base, grid = report["reported"].values()
    ratio = grid[key] / base[key]
    return f" (source experiments report {ratio:.2f}× for the grid on 16 H100)"
