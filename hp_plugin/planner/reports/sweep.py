"""Curves: tokens per second against micro-batches, sequence length or number of GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hp_plugin.planner.counts.feasibility import memory_refusal
from hp_plugin.planner.inputs.layout import Layout
from hp_plugin.planner.inputs.model_shape import ModelShape
from hp_plugin.planner.inputs.workload import Workload
from hp_plugin.planner.machine.hardware import Hardware
from hp_plugin.planner.search.candidates import Search
from hp_plugin.planner.search.plan import make_plan
from hp_plugin.planner.seconds.step import predict

KINDS = ("micro-batches", "seq", "gpus")
Curves = dict[str, list[tuple[float, float]]]


def sweep_curves(
    what: str,
    model: ModelShape,
    layouts: Sequence[Layout],
    workload: Workload,
    hardware: Hardware,
    largest: int,
    capacity: float | None = None,
    left_out: list[str] | None = None,
) -> Curves:
    """Tokens per second of each layout at powers of two; points that cannot run or do not fit go to `left_out`.

    `micro-batches` splits the same global batch; `seq` keeps tokens per step; `gpus` scales the batch with the GPUs
    (weak scaling) and takes the layout's data-parallel size up.

    Raises:
        ValueError: unknown `what`, or no point of any curve can run.
    """
    if what not in KINDS:
        raise ValueError(f"unknown sweep {what!r}: choose from {', '.join(KINDS)}")
    curves: Curves = {}
    left_out = [] if left_out is None else left_out
    for layout in layouts:
        points = []
        for value in _values(what, layout, workload, largest):
            try:
                changed, work = _at(what, value, layout, workload)
                found = predict(model, changed, work, hardware)
            except ValueError as error:
                left_out.append(f"{what} {value}: {error}")
                continue
            refusal = memory_refusal(found.memory, hardware, capacity)
            if refusal is None:
                points.append((float(value), found.tokens_per_s))
            else:
                left_out.append(f"{what} {value}: {changed}: {refusal.text}")
        if points:
            curves[str(layout)] = points
    if not curves:
        said = left_out[-1] if left_out else f"--sweep-to {largest} leaves no size to try"
        raise ValueError(f"no point of the {what} sweep can run: {said}")
    return curves


def _values(what: str, layout: Layout, workload: Workload, largest: int) -> list[int]:
    if what == "micro-batches":
        per_replica = workload.global_batch // layout.dp
        return [count for count in _powers(1, per_replica) if per_replica % count == 0]
    if what == "seq":
        tokens = workload.seq * workload.global_batch
        return [seq for seq in _powers(128, largest) if tokens % seq == 0]
    return [gpus for gpus in _powers(layout.world, largest)]


def _at(what: str, value: int, layout: Layout, workload: Workload) -> tuple[Layout, Workload]:
    if what == "micro-batches":
        return replace(layout, micro_batch=workload.global_batch // layout.dp // value), workload
    if what == "seq":
        batch = workload.seq * workload.global_batch // value
        return layout, replace(workload, seq=value, global_batch=batch)
    factor = value // layout.world
    return replace(layout, dp=layout.dp * factor), replace(workload, global_batch=workload.global_batch * factor)


def _powers(first: int, largest: int) -> list[int]:
    values = []
    while first <= largest:
        values.append(first)
        first *= 2
    return values


def representative_layouts(
    model: ModelShape, gpus: int, workload: Workload, hardware: Hardware, search: Search, capacity: float | None = None
) -> list[Layout]:
    """The fastest stock and the fastest exact grid layout, for sweeps without layouts of the user's own."""
    plan = make_plan(model, gpus, workload, hardware, search, capacity)
    stock = [found.layout for found in plan.exact if found.layout.grid is None][:1]
    return stock + [found.layout for found in plan.exact if found.layout.grid is not None][:1]


def sweep_report(curves: Curves, what: str, left_out: Sequence[str] = ()) -> list[str]:
    """A table with one column per layout, its legend, and why points are missing."""
    values = sorted({value for points in curves.values() for value, _ in points})
    names = list(curves)
    lines = [f"[{number}] {name}" for number, name in enumerate(names, start=1)]
    lines.append(f"{what:>14}" + "".join(f"{f'[{number}]':>16}" for number in range(1, len(names) + 1)) + "  tokens/s")
    for value in values:
        cells = "".join(
            f"{at[value]:>16,.0f}" if value in (at := dict(curves[name])) else f"{'-':>16}" for name in names
        )
        lines.append(f"{value:>14,.0f}{cells}")
    return [*lines, "left out:", *(f"  {said}" for said in left_out)] if left_out else lines
