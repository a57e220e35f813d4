"""`hp-plugin compare`: any layouts of one dense model side by side on this machine, stock and grid."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from hp_plugin.bench.layouts import MODELS, training_config
from hp_plugin.bench.ranks import Job, run_rank


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `compare` to a parser or subparser."""
    parser.add_argument("--model", default="tiny", help=f"{', '.join(MODELS)}, or FILE.json of trainer options")
    parser.add_argument("--layouts", nargs="+", required=True, help='"tp=8,pp=2" "grid=4x4,exchange=scores" …')
    parser.add_argument("--ranks", type=int, required=True, help="processes to start")
    parser.add_argument("--mode", choices=("train", "forward"), default="train")
    parser.add_argument("--global-batch", type=int, default=8, help="sequences per step, the same for all layouts")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a layout per round")
    parser.add_argument("--rounds", type=int, default=3, help="rounds over all layouts")
    parser.add_argument("--out", type=Path, default=Path("compare"), help="directory of report.json and report.md")


def run(args: argparse.Namespace) -> int:
    """Checks everything, starts the ranks, prints the table; 1 if a rank failed.

    Raises:
        ValueError: an option, model or layout that cannot run; no rank was started.
    """
    for name in ("ranks", "steps", "rounds", "global_batch"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be positive, got {getattr(args, name)}")
    if len(set(args.layouts)) < len(args.layouts):
        raise ValueError("--layouts: one is given twice")
    model = _model(args.model)
    layouts = {text: training_config(model, text, args.ranks, args.global_batch) for text in args.layouts}
    args.out.mkdir(parents=True, exist_ok=True)
    job = Job(args.model, layouts, args.mode, args.steps, args.rounds, str(args.out))
    for name in ("report.json", "report.md"):
        (args.out / name).unlink(missing_ok=True)
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=args.ranks,
        run_id="compare",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(settings, run_rank)(job)
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        kept = f"; partial results are in {args.out}" if (args.out / "report.json").exists() else ""
        said = failure.message["message"] if isinstance(failure.message, dict) else failure.message
        print(f"hp-plugin compare: error: rank {rank} failed: {said}{kept}", file=sys.stderr)
        return 1
    except SignalException as stopped:  # the launcher has ended all ranks by now
        raise KeyboardInterrupt from stopped
    print((args.out / "report.md").read_text(encoding="utf-8"), end="")
    return 0


def _model(name: str) -> dict[str, Any]:
    if name in MODELS:
        return MODELS[name]
    if not name.endswith(".json"):
        raise ValueError(f"--model {name}: choose from {', '.join(MODELS)}, or name a .json file")
    try:
        found = json.loads(Path(name).read_text(encoding="utf-8"))
    except json.JSONDecodeError as wrong:
        raise ValueError(f"--model {name} is not JSON: {wrong}") from None
    if not isinstance(found, dict):
        raise ValueError(f"--model {name} must hold one object of trainer options")
    return found
