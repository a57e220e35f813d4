"""`hp-plugin plan`: predicts, ranks and explains parallel layouts; needs no torch."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import inf
from pathlib import Path

from hp_plugin.planner.counts.feasibility import MAX_GPUS, memory_refusal
from hp_plugin.planner.inputs.launch_script import launch_words
from hp_plugin.planner.inputs.layout import MAX_SIZE, Layout
from hp_plugin.planner.inputs.megatron_launch import read_launch
from hp_plugin.planner.inputs.model_shape import load_model, presets
from hp_plugin.planner.inputs.workload import MODES, Workload
from hp_plugin.planner.machine.gemm import GemmTable
from hp_plugin.planner.machine.hardware import Hardware, load_hardware, shipped
from hp_plugin.planner.machine.nccl_tests import read_nccl_log
from hp_plugin.planner.reports import kv_heads, long_context, reproduce, sweep, validate
from hp_plugin.planner.reports.advice import launch_advice, relief_lines
from hp_plugin.planner.reports.chrome_trace import write_trace
from hp_plugin.planner.reports.figure import draw_curves, draw_map, draw_timeline, require_matplotlib
from hp_plugin.planner.reports.motion_map import map_motions, map_report
from hp_plugin.planner.reports.text import explanation, hardware_report, plan_report, refused_report
from hp_plugin.planner.search.candidates import Search
from hp_plugin.planner.search.plan import make_plan
from hp_plugin.planner.seconds.prediction import Prediction
from hp_plugin.planner.seconds.step import predict
from hp_plugin.refusal import RefusedError, first_reasons, shown

MAX_DRAWN = 4096
"""Micro-batches beyond which nobody looks at a picture of all of them."""
_SUITES = {
    "kv-heads": kv_heads.kv_heads_report,
    "long-context": long_context.long_context_report,
    "megatron-bridge": validate.bridge_report,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `plan` to a parser or subparser."""
    parser.description = "Predict tokens/s, communication time and memory of every layout of a model, and rank them."
    what = parser.add_argument_group("what to run")
    what.add_argument(
        "--model", default="paper-dense", help=f"{', '.join(presets())}, FILE.json, or layers=..,D=..,h=.."
    )
    what.add_argument(
        "--from-launch",
        metavar="LINE",
        help="a launch of Megatron-LM that you have, as a command line or a script with its arguments: what to change",
    )
    what.add_argument("--gpus", type=_integer, help="16, or what --from-launch starts")
    what.add_argument("--hardware", default="h100-ib", help=f"{', '.join(shipped())}, or FILE.json")
    what.add_argument("--mode", type=_word, choices=MODES, default="train")
    what.add_argument(
        "--global-batch", type=_integer, default=1024, help="sequences per step (decode: sequences at a time)"
    )
    what.add_argument("--seq", type=_integer, default=2048, help="tokens per sequence (decode: context length)")
    what.add_argument("--continuous", action="store_true", help="decode: micro-batches follow each other without a gap")
    what.add_argument("--memory-gb", type=_number, help="device memory, if not the hardware's")
    what.add_argument("--grad-reduce-in-bf16", action="store_true", help="as in Megatron: gradients reduced in 16 bit")
    what.add_argument(
        "--dtype", type=_word, choices=("bf16", "fp16"), default="bf16", help="fp16: gradients reduced in 16 bit"
    )
    search = parser.add_argument_group("which layouts")
    search.add_argument("--tp", type=_integer, nargs="+", metavar="SIZE", help="only these tensor-parallel sizes")
    search.add_argument(
        "--exchange",
        nargs="+",
        type=_word,
        choices=Search().exchanges,
        default=list(Search().exchanges),
        help="exchanges of grids",
    )
    search.add_argument("--tp-comm-overlap", action="store_true", help="also layouts with Megatron's --tp-comm-overlap")
    search.add_argument(
        "--peers",
        action="store_true",
        help="also stock layouts of rarer flags: GTP (Megatron-Core 0.19) and context parallelism by heads (a2a+p2p)",
    )
    search.add_argument("--max-micro-batch", type=_integer, default=64)
    search.add_argument("--micro-batches", type=_integer, help="only layouts with this many micro-batches per step")
    out = parser.add_argument_group("what to show")
    out.add_argument("--top", type=_integer, default=10)
    out.add_argument("--list-refused", action="store_true", help="every layout that cannot run, with its reason")
    out.add_argument("--explain", metavar="LAYOUT", help="where one layout's step goes, for example tp=8,pp=2,mbs=4")
    out.add_argument("--trace", type=Path, metavar="FILE.json", help="with --explain: Chrome trace, opens in Perfetto")
    out.add_argument("--png", type=Path, metavar="FILE.png", help="with --explain or --sweep: picture (matplotlib)")
    out.add_argument(
        "--map",
        type=Path,
        metavar="FILE.png",
        help="grids over tokens per micro-batch: whether activations or weights send less, and what is fastest",
    )
    out.add_argument("--sweep", type=_word, choices=sweep.KINDS, help="curves over powers of two")
    out.add_argument("--layouts", nargs="+", metavar="LAYOUT", help="with --sweep: layouts to draw")
    out.add_argument("--sweep-to", type=_integer, default=4096, help="largest --sweep seq or gpus")
    out.add_argument("--validate", action="store_true", help="predicted against published measurements")
    out.add_argument(
        "--reproduce", type=_word, choices=("paper",), help="the source experiments' rows beside predictions"
    )
    out.add_argument(
        "--suite",
        type=_word,
        choices=_SUITES,
        help="public models: at TP sizes beyond their key/value heads; decoding at contexts of 32k and 128k (minutes); "
        "beside rows that Megatron-Bridge publishes",
    )
    out.add_argument("--show-hardware", action="store_true", help="every parameter of the hardware with its source")
    own = parser.add_argument_group("measurements of your own")
    own.add_argument(
        "--nccl-tests", nargs="+", default=[], metavar="[COLLECTIVE=]FILE", help="output of nccl-tests programs"
    )
    own.add_argument("--gemm-table", type=Path, metavar="FILE.csv", help="columns batch,m,n,k,tflops")


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"takes an integer, got {shown(text)}") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"takes a number, got {shown(text)}") from None


def _word(text: str) -> str:
    # argparse repeats in full what is no choice.
    return text if len(text) < 60 else shown(text)


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
    _check(args)
    if args.validate:
        return validate.validation_report(validate.compare_all())
    if args.reproduce:
        return reproduce.reproduction_report()
    if args.suite:
        return _SUITES[args.suite]()
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


_SHOWN = ("map", "validate", "reproduce", "suite", "show_hardware", "explain", "sweep", "list_refused", "from_launch")
_LAUNCHED = ("model", "mode", "global_batch", "seq", "continuous", "grad_reduce_in_bf16", "dtype")
"""Options whose values a launch line has itself."""


def _check(args: argparse.Namespace) -> None:
    asked = [f"--{name.replace('_', '-')}" for name in _SHOWN if getattr(args, name) not in (None, False)]
    if len(asked) > 1:
        raise ValueError(f"{' and '.join(asked)} show different things: ask for one at a time")
    if args.validate or args.reproduce or args.suite:
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        others = [name for name, value in vars(parser.parse_args([])).items() if getattr(args, name) != value]
        others = [f"--{name.replace('_', '-')}" for name in others if name not in _SHOWN]
        if others:
            raise ValueError(f"{asked[0]} has its own models and machines and takes no {' or '.join(others)}")
    if args.from_launch is not None:
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        known = parser.parse_args([])
        twice = [f"--{name.replace('_', '-')}" for name in _LAUNCHED if getattr(args, name) != getattr(known, name)]
        if twice:
            raise ValueError(f"--from-launch has its own model and batch and takes no {' or '.join(twice)}")
    for size in args.tp or ():
        if not 1 <= size <= MAX_SIZE:
            said = "positive" if size < 1 else f"at most {MAX_SIZE:,}"
            raise ValueError(f"--tp must be {said}, got {shown(size)}")
    if args.gpus is not None and args.gpus > MAX_GPUS:
        raise ValueError(f"--gpus must be at most {MAX_GPUS:,}, got {shown(args.gpus)}")
    for name in ("gpus", "top", "max_micro_batch", "sweep_to", "micro_batches", "memory_gb"):
        value = getattr(args, name)
        if value is not None and not 0 < value <= MAX_SIZE:
            said = "positive" if not 0 < value < inf else f"at most {MAX_SIZE:,}"
            raise ValueError(f"--{name.replace('_', '-')} must be {said}, got {shown(value)}")
    if args.trace and args.explain is None:
        raise ValueError("--trace draws one step: name its layout with --explain")
    if args.png and args.explain is None and not args.sweep:
        raise ValueError("--png draws a step or a sweep: add --explain or --sweep")
    if args.layouts and not args.sweep:
        raise ValueError("--layouts goes with --sweep; for one layout's step use --explain")
    for option, path in (("--trace", args.trace), ("--png", args.png), ("--map", args.map)):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise ValueError(f"{option} {path}: name a file in a folder that exists")
    if args.png or args.map:
        require_matplotlib()


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
