"""Which motion sends less, activations' or weights', and which layout is fastest, over micro-batches and grids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from hp_plugin.config import HeadDimConfig
from hp_plugin.exchange.rules import RULES, count
from hp_plugin.planner.counts.share import Share
from hp_plugin.planner.inputs.layout import Layout
from hp_plugin.planner.inputs.model_shape import ModelShape
from hp_plugin.planner.inputs.workload import Workload
from hp_plugin.planner.machine.hardware import Hardware
from hp_plugin.planner.reports.text import TIE
from hp_plugin.planner.search.candidates import MAX_TENSOR_PARALLEL
from hp_plugin.planner.search.plan import fitting
from hp_plugin.refusal import RefusedError

TOKENS = tuple(2**power for power in range(8, 18))
"""Tokens per micro-batch, 256 to 131,072; fewer than a sequence has are shorter sequences."""


@dataclass(frozen=True)
class Cell:
    """One grid over all GPUs at one size of micro-batch.

    Args:
        activations, weights: bytes that a rank sends per layer, the fewest of either motion; None where none fits.
        rates: tokens/s of the fastest layout of either motion that fits into memory, by its exchange.
    """

    tokens: int
    m: int
    n: int
    activations: float | None
    weights: float | None
    rates: dict[str, float]

    @property
    def ratio(self) -> float | None:
        """Bytes of the motion of weights over those of activations."""
        return self.weights / self.activations if self.weights and self.activations else None

    @property
    def fastest(self) -> str:
        """The fastest exchange, empty where none fits into memory."""
        return max(self.rates, key=self.rates.__getitem__, default="")


@dataclass(frozen=True)
class MotionMap:
    """Cells by grid and tokens, and the fastest stock layout (name, tokens/s) at each size of micro-batch."""

    cells: list[Cell]
    stock: dict[int, tuple[str, float]]


def map_motions(
    model: ModelShape, gpus: int, workload: Workload, hardware: Hardware, capacity: float | None = None
) -> MotionMap:
    """Counts and predicts every grid of all GPUs, with and without sequence parallelism.

    Raises:
        ValueError: decode, or no grid of this size fits the model.
    """
    if workload.mode == "decode":
        raise ValueError("--map is of micro-batches of many tokens: --mode forward or train")
    grids = [(gpus // n, n) for n in range(2, gpus + 1) if gpus % n == 0 and _holds(model, gpus // n, n)]
    if gpus > MAX_TENSOR_PARALLEL or not grids:
        said = f"(at most {MAX_TENSOR_PARALLEL})" if gpus > MAX_TENSOR_PARALLEL else f"for {model.name}"
        raise ValueError(f"--map has no grid of {gpus} GPUs {said}: m must divide h and g, n the head dimension")
    cells: list[Cell] = []
    stock: dict[int, tuple[str, float]] = {}
    for tokens in TOKENS:
        b, work = _at(tokens, workload)
        if work.global_batch % b:
            continue
        for m, n in grids:
            cells.append(_cell(model, gpus, m, n, b, tokens, work, hardware, capacity))
        best = max(_stock(model, gpus, b, work, hardware, capacity), key=lambda one: one[1], default=None)
        if best is not None:
            stock[tokens] = best
    return MotionMap(cells, stock)


def _holds(model: ModelShape, m: int, n: int) -> bool:
    return model.g % m == 0 and model.d % n == 0 and model.ffn % (m * n) == 0


def _at(tokens: int, workload: Workload) -> tuple[int, Workload]:
    """Sequences of a micro-batch of so many tokens, and the same tokens per step in sequences of that length."""
    seq = min(tokens, workload.seq)
    return max(1, tokens // seq), replace(workload, seq=seq, global_batch=workload.global_batch * workload.seq // seq)


def _cell(
    model: ModelShape,
    gpus: int,
    m: int,
    n: int,
    b: int,
    tokens: int,
    work: Workload,
    hardware: Hardware,
    capacity: float | None,
) -> Cell:
    layout = Layout(tp=gpus, grid=HeadDimConfig(m, n), micro_batch=b)
    mixed = bool(model.experts) and model.moe_layers == model.layers
    block = Share.on(hardware, model, layout, work).block_shape(0 if mixed else 1, 1 if mixed else 0)
    layers = replace(block, dense=block.dense * model.layers, moe=block.moe * model.layers)
    try:
        sent = count(layers, work.training, work.itemsize).bytes
    except RefusedError:
        sent = {}
    fewest: dict[bool, float] = {}
    rates: dict[str, float] = {}
    for name, size in sent.items():
        fewest.setdefault(RULES[name].moves_weights, size / model.layers)
        found = _rates(model, replace(layout, grid=HeadDimConfig(m, n, name)), work, hardware, capacity)
        if found:
            rates[name] = max(found)
    return Cell(tokens, m, n, fewest.get(False), fewest.get(True), rates)


def _rates(
    model: ModelShape, layout: Layout, work: Workload, hardware: Hardware, capacity: float | None
) -> list[float]:
    found = []
    for sp in (False, True) if layout.tp > 1 else (False,):
        try:
            found.append(fitting(model, replace(layout, sp=sp), work, hardware, capacity).tokens_per_s)
        except RefusedError:
            continue
    return found


def _stock(
    model: ModelShape, gpus: int, b: int, work: Workload, hardware: Hardware, capacity: float | None
) -> Iterator[tuple[str, float]]:
    """Every stock layout of tensor, pipeline and data parallelism, and FSDP, with this micro-batch."""
    experts = min(model.experts, gpus)
    for tp in (size for size in range(1, gpus + 1) if gpus % size == 0):
        for pp in (size for size in range(1, gpus // tp + 1) if gpus // tp % size == 0):
            for zero in ("optimizer", "full") if tp * pp < gpus else ("optimizer",):
                layout = Layout(
                    tp=tp, pp=pp, dp=gpus // (tp * pp), ep=max(1, experts // pp), micro_batch=b, zero=zero
                )  # fmt: skip
                for rate in _rates(model, layout, work, hardware, capacity):
                    name = f"TP={tp}" + "".join(
                        f" {axis}={size}" for axis, size in (("PP", pp), ("DP", layout.dp)) if size > 1
                    )
                    yield name + (" FSDP" if zero == "full" else ""), rate


def map_report(found: MotionMap, model: ModelShape, gpus: int, mode: str, machine: str) -> list[str]:
    """The map as tables: bytes of both motions, then tokens/s beside the fastest stock layout."""
    lines = [
        f"{model.name}, {mode}, {gpus} × {machine}: every grid of {gpus} GPUs by tokens per micro-batch",
        "",
        "MB that a rank sends per layer, activations moved / weights moved; * marks what sends less",
    ]
    grids = list(dict.fromkeys((cell.m, cell.n) for cell in found.cells))
    lines.append(_row("tokens", [f"{m}x{n}" for m, n in grids]))
    for tokens, cells in _by_tokens(found.cells):
        lines.append(_row(f"{tokens:,}", [_sent(cell) for cell in cells]))
    lines += [
        "",
        f"fastest: exchange and M tokens/s; stock last; = marks rates within {TIE - 1:.0%} of the best: a tie",
    ]
    lines.append(_row("tokens", [*(f"{m}x{n}" for m, n in grids), "stock"]))
    for tokens, cells in _by_tokens(found.cells):
        name, rate = found.stock.get(tokens, ("-", 0.0))
        best = max([rate, *(cell.rates.get(cell.fastest, 0.0) for cell in cells)])
        said = [_rated(cell.fastest, cell.rates.get(cell.fastest, 0.0), best) for cell in cells]
        lines.append(_row(f"{tokens:,}", [*said, _rated(name, rate, best)]))
    return lines


def _by_tokens(cells: Sequence[Cell]) -> Iterator[tuple[int, list[Cell]]]:
    for tokens in dict.fromkeys(cell.tokens for cell in cells):
        yield tokens, [cell for cell in cells if cell.tokens == tokens]


def _row(head: str, cells: Sequence[str]) -> str:
    return f"{head:>8}" + "".join(f"  {cell:>22}" for cell in cells)


def _sent(cell: Cell) -> str:
    ratio = cell.ratio
    sizes = ["-" if size is None else f"{size / 1e6:,.0f}" for size in (cell.activations, cell.weights)]
    if ratio is not None:
        sizes[int(ratio < 1)] += "*"
    return " / ".join(sizes)


def _rated(name: str, rate: float, best: float) -> str:
    return f"{name} {rate / 1e6:.3f}{'=' if rate * TIE >= best else ' '}" if rate else "does not fit"
