"""Where a grid pays: public models at TP sizes beyond their key/value heads, or that do not divide their heads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hp_plugin.planner.counts.feasibility import width_refusals
from hp_plugin.planner.inputs.layout import Layout
from hp_plugin.planner.inputs.model_shape import ModelShape
from hp_plugin.planner.inputs.models import load_model
from hp_plugin.planner.inputs.workload import Workload
from hp_plugin.planner.machine.hardware import load_hardware
from hp_plugin.planner.search.candidates import Search
from hp_plugin.planner.search.plan import make_plan
from hp_plugin.planner.seconds.prediction import Prediction

MACHINE = "h100-ib"
"""The machine that the models are predicted on."""
CASES = {
    "qwen2.5-3b": (16, (8, 16)),
    "qwen2.5-7b": (16, (8, 16)),
    "llama3-8b": (16, (16,)),
    "qwen3-30b-a3b": (16, (8, 16)),
    "qwen2.5-32b": (32, (16,)),
    "qwen3-32b": (32, (16,)),
    "llama3-70b": (64, (16,)),
}
"""Models with the GPUs they train on, and TP sizes of up to two nodes that exceed g or do not divide h."""
WORKLOADS = {
    "train": Workload("train", 4096, 256),
    "decode": Workload("decode", 4096, 16),
}
"""What is run, by mode: a batch that all layouts can share, and few sequences for latency."""
EXCHANGES = {"train": ("batch", "sequence"), "decode": ("batch",)}
"""Exchanges of grids by mode; caches that are spread by tokens are in the suite of long contexts."""
MAX_MICRO_BATCH = 8
"""Sequences per micro-batch tried."""


@dataclass(frozen=True)
class Row:
    """The fastest layouts of one model: stock and exact grid at one TP size, and stock at any; None: cannot run."""

    model: ModelShape
    gpus: int
    tp: int
    stock: Prediction | None
    grid: Prediction | None
    any_stock: Prediction | None

    @property
    def cells(self) -> str:
        """The row as text."""
        model, stock, grid = self.model, self.stock, self.grid
        said = f"{model.name:<15}{model.h:>3}{model.g:>3}{self.gpus:>5}{self.tp:>4}"
        said += f"{stock.tokens_per_s:>14,.0f}" if stock else f"{self._refusal:>14}"
        if grid is None or grid.layout.grid is None:
            return f"{said}  no grid fits"
        said += f"  {f'{grid.layout.m}x{grid.layout.n} {grid.layout.grid.exchange}':<13}{grid.tokens_per_s:>10,.0f}"
        if stock:
            said += f"{grid.tokens_per_s / stock.tokens_per_s:>7.2f}{grid.tpot / stock.tpot:>7.2f}"
        else:
            said += f"{'-':>7}" * 2
        best = self.any_stock
        return said + (f"{grid.tokens_per_s / best.tokens_per_s:>7.2f}  {best.layout}" if best else f"{'-':>7}")

    @property
    def _refusal(self) -> str:
        return "not possible" if width_refusals(self.model, Layout(self.tp)) else "no memory"


def rows(mode: str) -> Iterator[Row]:
    """Every case in one mode."""
    for name, (gpus, sizes) in CASES.items():
        model = load_model(name)
        any_stock = next(iter(_found(model, gpus, mode, Search((), max_micro_batch=MAX_MICRO_BATCH))), None)
        for tp in sizes:
            yield row(model, gpus, tp, mode, any_stock)


def row(model: ModelShape, gpus: int, tp: int, mode: str, any_stock: Prediction | None) -> Row:
    """One model at one TP size; micro-batch, pipeline, data parallelism and recomputation are free on both sides."""
    search = Search(EXCHANGES[mode], max_micro_batch=MAX_MICRO_BATCH, tensor_parallel=(tp,))
    found = _found(model, gpus, mode, search)
    stock = next((one for one in found if one.layout.grid is None), None)
    return Row(model, gpus, tp, stock, next((one for one in found if one.layout.grid), None), any_stock)


def _found(model: ModelShape, gpus: int, mode: str, search: Search) -> list[Prediction]:
    """Predictions, fastest first; none where nothing fits."""
    try:
        return make_plan(model, gpus, WORKLOADS[mode], load_hardware(MACHINE), search).found
    except ValueError:
        return []


def kv_heads_report() -> list[str]:
    """A table for each mode."""
    lines = [
        f"Tensor parallelism beyond heads: the fastest exact grid against the fastest stock layout, {MACHINE}",
        "Micro-batch (up to 8), pipeline, data parallelism, sequence parallelism and recomputation are free on both",
        "sides. Ratios grid/stock at the same TP: tokens/s and TPOT; any TP: tokens/s to the fastest stock layout.",
    ]
    for mode, workload in WORKLOADS.items():
        length = "context" if mode == "decode" else "sequence"
        lines += [
            "",
            f"{mode}: {workload.global_batch} sequences, {length} {workload.seq}",
            f"{'model':<15}{'h':>3}{'g':>3}{'GPUs':>5}{'TP':>4}{'stock':>14}  {'grid':<13}{'tokens/s':>10}"
            f"{'ratio':>7}{'TPOT':>7}{'any TP':>7}  fastest stock",
            *(row.cells for row in rows(mode)),
        ]
    return lines
