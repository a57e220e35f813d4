"""`hp-plugin plan`: predicts, ranks and explains parallel layouts; needs no torch."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from hp_plugin.commands.plan_options import SUITES, add_arguments, check_options
from hp_plugin.planner.counts.feasibility import memory_refusal
from hp_plugin.planner.inputs.launch_script import launch_words
from hp_plugin.planner.inputs.layout import Layout
from hp_plugin.planner.inputs.megatron_launch import read_launch
from hp_plugin.planner.inputs.models import load_model
from hp_plugin.planner.inputs.workload import Workload
from hp_plugin.planner.machine.gemm import GemmTable
from hp_plugin.planner.machine.hardware import Hardware, load_hardware
from hp_plugin.planner.machine.nccl_tests import read_nccl_log
from hp_plugin.planner.reports import reproduce, sweep, validate
from hp_plugin.planner.reports.advice import launch_advice, relief_lines
from hp_plugin.planner.reports.chrome_trace import write_trace
from hp_plugin.planner.reports.figure import draw_curves, draw_map, draw_timeline
from hp_plugin.planner.reports.motion_map import map_motions, map_report
from hp_plugin.planner.reports.text import explanation, hardware_report, plan_report, refused_report
from hp_plugin.planner.search.candidates import Search
from hp_plugin.planner.search.plan import make_plan
from hp_plugin.planner.seconds.prediction import Prediction
from hp_plugin.planner.seconds.step import predict
from hp_plugin.refusal import RefusedError, first_reasons

MAX_DRAWN = 4096
"""Micro-batches beyond which nobody looks at a picture of all of them."""


def run(args: argparse.Namespace) -> int:
    """Prints what was asked for; returns the exit code.

    Raises:
        ValueError: anything the user can mend, in one line.
    """
    try:
        lines = _lines(args)
    except ValueError as error:
        # Of many reasons the first; whoever wants all lists the refused layouts.
        raise ValueError(first_reasons(str(error))) from None
    for line in lines:
        print(line)
    return 0


def _lines(args: argparse.Namespace) -> list[str]:
    check_options(args)
    if args.validate:
        return validate.validation_report(validate.compare_all())
    if args.reproduce:
        return reproduce.reproduction_report()
    if args.suite:
        return SUITES[args.suite]()
    hardware = _hardware(args)
    if args.show_hardware:
        return hardware_report(hardware)
    capacity = args.memory_gb * 1e9 if args.memory_gb is not None else None
    search = Search(
        tuple(dict.fromkeys(args.exchange)),
        args.tp_comm_overlap,
        args.max_micro_batch,
        args.micro_batches,
        tuple(args.tp) if args.tp else None,
        peers=args.peers,
    )
    if args.from_launch is not None:
        return _advised(args, hardware, search, capacity)
    args.gpus = 16 if args.gpus is None else args.gpus
    model = load_model(args.model)
    workload = Workload(
        args.mode,
        args.seq,
        args.global_batch,
        grad_itemsize=2 if args.grad_reduce_in_bf16 or args.dtype == "fp16" else 4,
        continuous=args.continuous,
    )
    if args.explain is not None:
        layout = Layout.parse(args.explain, args.gpus)
        drawn = args.trace is not None or args.png is not None
        if drawn and workload.global_batch > MAX_DRAWN * layout.dp * layout.micro_batch:
            raise ValueError(f"--trace and --png draw up to {MAX_DRAWN:,} micro-batches: use a smaller --global-batch")
        return _explained(args, model.name, predict(model, layout, workload, hardware, drawn), hardware, capacity)
    if args.sweep:
        layouts = [Layout.parse(text, args.gpus) for text in args.layouts or []]
        if len(set(layouts)) < len(layouts):
            raise ValueError("--layouts: one is given twice")
        layouts = layouts or sweep.representative_layouts(model, args.gpus, workload, hardware, search, capacity)
        left_out: list[str] = []
        curves = sweep.sweep_curves(args.sweep, model, layouts, workload, hardware, args.sweep_to, capacity, left_out)
        if args.png:
            draw_curves(curves, args.sweep, args.png)
        return sweep.sweep_report(curves, args.sweep, left_out)
    if args.map:
        found = map_motions(model, args.gpus, workload, hardware, capacity)
        lines = map_report(found, model, args.gpus, args.mode, hardware.name)
        draw_map(found, lines[0], args.map)
        return [*lines, f"picture: {args.map}"]
    plan = make_plan(model, args.gpus, workload, hardware, search, capacity, _progress())
    if args.list_refused:
        return refused_report(plan)
    head = (
        f"{model.name} ({model.parameters / 1e9:.2f} B parameters), {args.mode}, {args.gpus} × {hardware.name}, "
        f"{workload.global_batch} sequences of {workload.seq}"
    )
    return [head, "", *plan_report(plan, args.top, args.dtype)]


def _advised(args: argparse.Namespace, hardware: Hardware, search: Search, capacity: float | None) -> list[str]:
    launch = read_launch(launch_words(args.from_launch), args.gpus)
    refusal = None
    try:
        mine = predict(launch.model, launch.layout, launch.workload, hardware)
    except RefusedError as error:
        refusal, mine = str(error), None
    # Micro-batches far beyond the launch's own are not what is asked, and a search for hundreds of GPUs takes minutes.
    largest = min(search.max_micro_batch, 4 * launch.layout.micro_batch)
    search = replace(search, max_micro_batch=largest)
    try:
        plan = make_plan(launch.model, launch.gpus, launch.workload, hardware, search, capacity, _progress())
    except ValueError as error:
        if mine is None:
            raise
        return launch_advice(launch, mine, None, hardware, capacity, str(error))
    if mine is None:
        return [f"does not run: {refusal}", *launch.notes, "", *plan_report(plan, args.top, launch.dtype)]
    return launch_advice(launch, mine, plan, hardware, capacity)


def _explained(
    args: argparse.Namespace, name: str, found: Prediction, hardware: Hardware, capacity: float | None
) -> list[str]:
    lines = explanation(found, hardware)
    refusal = memory_refusal(found.memory, hardware, capacity)
    if refusal is not None:
        # Beside the parts above: what would free most.
        lines += [f"does not fit: {refusal.text}", *relief_lines(found, hardware)]
    if args.trace:
        write_trace(found, args.trace)
        lines.append(f"trace: {args.trace} (open in https://ui.perfetto.dev)")
    if args.png:
        draw_timeline(found, args.png)
        lines.append(f"picture: {args.png}")
    return lines


def _progress() -> Callable[[int], None] | None:
    """Counts layouts on one line of a terminal; searches on many GPUs take a while."""
    if not sys.stderr.isatty():
        return None
    began = last = time.monotonic()

    def watch(number: int) -> None:
        nonlocal last
        if time.monotonic() - last > 0.5:
            last = time.monotonic()
            print(f"\r{number:,} layouts in {last - began:.0f} s", end="\r", file=sys.stderr, flush=True)

    return watch


def _hardware(args: argparse.Namespace) -> Hardware:
    hardware = load_hardware(args.hardware)
    if args.gemm_table:
        try:
            hardware = hardware.with_gemm(GemmTable.from_csv(args.gemm_table))
        except OSError as error:
            raise ValueError(f"--gemm-table {args.gemm_table}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"--gemm-table {args.gemm_table}: not UTF-8 text ({error.reason})") from None
    for entry in args.nccl_tests:
        kind, _, file = entry.partition("=")
        named = bool(file) and not Path(entry).exists()
        path = Path(file if named else entry)
        for measured in read_nccl_log(path, kind if named else None):
            for note in measured.notes:
                print(f"hp-plugin plan: {path}: {note}", file=sys.stderr)
            curves = {(measured.kind, measured.ranks, measured.nodes): measured.curve}
            source = f"{measured.kind}, {measured.ranks} ranks on {measured.nodes} node(s): {path}"
            hardware = hardware.with_curves(curves, "; ".join((source, *measured.notes)))
    return hardware


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m hp_plugin.commands.plan`: errors end as one line on stderr, exit code 2."""
    parser = argparse.ArgumentParser(prog="hp-plugin plan")
    add_arguments(parser)
    try:
        return run(parser.parse_args(arguments))
    except ValueError as error:
        print(f"hp-plugin plan: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
