"""Pictures of predictions, with matplotlib where it is installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from math import log2
from pathlib import Path
from typing import Any

from hp_plugin.planner.reports.motion_map import MotionMap
from hp_plugin.planner.seconds.prediction import Prediction

COLOURS = {"F": "#4c78a8", "B": "#f58518", "pipeline": "#bab0ac", "gradients": "#54a24b", "optimizer": "#b279a2"}


def draw_timeline(prediction: Prediction, path: Path) -> None:
    """One row per pipeline stage and lane: forward and backward passes, sends, gradients, optimizer.

    Raises:
        ValueError: matplotlib is missing, there is nothing to draw, or the file cannot be written.
    """
    if not prediction.events:
        raise ValueError(f"{prediction.layout}: continuous decode has no single step to draw")
    pyplot = _pyplot()
    ranks = sorted({event.rank for event in prediction.events})
    figure, axes = pyplot.subplots(figsize=(12, 1.2 + 0.7 * len(ranks)))
    for event in prediction.events:
        # The gradients' own lane is drawn below the passes it runs beside.
        low, high = (0.05, 0.3) if event.lane == "gradients" else (0.35, 0.95)
        colour = COLOURS[event.name[0] if event.lane == "passes" else event.lane]
        row = len(ranks) - 1 - event.rank
        span = [(event.start * 1e3, (event.end - event.start) * 1e3)]
        axes.broken_barh(span, (row + low, high - low), facecolors=colour, edgecolor="white", linewidth=0.2)
    axes.set_yticks([len(ranks) - 0.5 - rank for rank in ranks], [f"stage {rank}" for rank in ranks])
    axes.set_xlabel("ms")
    axes.set_title(f"{prediction.model.name}: {prediction.layout}, one {prediction.workload.mode} step (predicted)")
    _save(figure, path)
    pyplot.close(figure)


def draw_curves(curves: Mapping[str, Sequence[tuple[float, float]]], x: str, path: Path) -> None:
    """Tokens per second against one quantity, one line per layout.

    Raises:
        ValueError: matplotlib is missing or the file cannot be written.
    """
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for name, points in curves.items():
        axes.plot([at for at, _ in points], [value for _, value in points], marker="o", markersize=3, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xlabel(x)
    axes.set_ylabel("tokens/s (predicted)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    _save(figure, path)
    pyplot.close(figure)


def draw_map(found: MotionMap, title: str, path: Path) -> None:
    """Grids over tokens per micro-batch: bytes of the motion of weights over those of activations, and which layout is
    fastest.

    Raises:
        ValueError: matplotlib is missing or the file cannot be written.
    """
    pyplot = _pyplot()
    grids = list(dict.fromkeys((cell.m, cell.n) for cell in found.cells))
    tokens = list(dict.fromkeys(cell.tokens for cell in found.cells))
    at = {(cell.tokens, cell.m, cell.n): cell for cell in found.cells}
    figure, panels = pyplot.subplots(2, 1, figsize=(1.5 + 1.25 * len(tokens), 2.2 + 1.3 * len(grids)))
    for panel, what in zip(panels, ("sent", "fastest"), strict=True):
        values = []
        for row, (m, n) in enumerate(grids):
            line = []
            for column, size in enumerate(tokens):
                cell = at[size, m, n]
                stock = found.stock.get(size, ("", 0.0))[1]
                ratio = cell.ratio if what == "sent" else cell.rates.get(cell.fastest, 0.0) / stock if stock else None
                said = "" if not ratio else f"{ratio:.2f}" if what == "sent" else f"{cell.fastest}\n{ratio:.2f}"
                panel.text(column, row, said or "-", ha="center", va="center", fontsize=7)
                # Half to double fills the scale, blue where weights, or the grid, do better.
                value = min(1.0, max(-1.0, log2(ratio))) if ratio else 0.0
                line.append(-value if what == "sent" else value)
            values.append(line)
        panel.imshow(values, cmap="RdYlBu", vmin=-1.5, vmax=1.5, aspect="auto")
        panel.set_yticks(range(len(grids)), [f"{m} × {n}" for m, n in grids])
        names = [f"\n{found.stock[size][0]}" if what == "fastest" and size in found.stock else "" for size in tokens]
        panel.set_xticks(
            range(len(tokens)), [f"{size:,}{name}" for size, name in zip(tokens, names, strict=True)], fontsize=6
        )
    panels[0].set_title(
        f"{title}\nbytes sent: weights moved / activations moved (below 1: weights send less)", fontsize=9
    )
    panels[1].set_title("tokens/s: the grid's fastest exchange / the fastest stock layout (named below)", fontsize=9)
    panels[1].set_xlabel("tokens per micro-batch")
    figure.tight_layout()
    _save(figure, path)
    pyplot.close(figure)


def require_matplotlib() -> None:
    """Says how to get it where it is missing.

    Raises:
        ValueError: it is.
    """
    if find_spec("matplotlib") is None:
        raise ValueError("drawing needs matplotlib: pip install matplotlib (or hp-plugin[plot])")


def _pyplot() -> Any:
    require_matplotlib()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> None:
    try:
        figure.savefig(path, dpi=150, bbox_inches="tight")
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot write {path}: {error}") from None
