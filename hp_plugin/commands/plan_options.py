"""The options of `hp-plugin plan`, and which of them go together."""

from __future__ import annotations

import argparse
from math import inf
from pathlib import Path

from hp_plugin.planner.counts.feasibility import MAX_GPUS
from hp_plugin.planner.inputs.layout import MAX_SIZE
from hp_plugin.planner.inputs.models import presets
from hp_plugin.planner.inputs.workload import MODES
from hp_plugin.planner.machine.hardware import shipped
from hp_plugin.planner.reports import kv_heads, long_context, sweep, validate
from hp_plugin.planner.reports.figure import require_matplotlib
from hp_plugin.planner.search.candidates import Search
from hp_plugin.refusal import shown

SUITES = {
    "kv-heads": kv_heads.kv_heads_report,
    "long-context": long_context.long_context_report,
    "megatron-bridge": validate.bridge_report,
}
"""Tables of several models, by their names."""


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
        choices=SUITES,
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


_SHOWN = ("map", "validate", "reproduce", "suite", "show_hardware", "explain", "sweep", "list_refused", "from_launch")
_LAUNCHED = ("model", "mode", "global_batch", "seq", "continuous", "grad_reduce_in_bf16", "dtype")
"""Options whose values a launch line has itself."""


def _defaults() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args([])


def check_options(args: argparse.Namespace) -> None:
    """Whether the options that were given go together.

    Raises:
        ValueError: they do not, or a value is out of range; in one line.
    """
    asked = [f"--{name.replace('_', '-')}" for name in _SHOWN if getattr(args, name) not in (None, False)]
    if len(asked) > 1:
        raise ValueError(f"{' and '.join(asked)} show different things: ask for one at a time")
    if args.validate or args.reproduce or args.suite:
        others = [name for name, value in vars(_defaults()).items() if getattr(args, name) != value]
        others = [f"--{name.replace('_', '-')}" for name in others if name not in _SHOWN]
        if others:
            raise ValueError(f"{asked[0]} has its own models and machines and takes no {' or '.join(others)}")
    if args.from_launch is not None:
        known = _defaults()
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
