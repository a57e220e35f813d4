"""`hp-plugin compare`: any layouts of one model side by side on this machine, stock and grid."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

from hp_plugin.compare.entries.catalogue import MODELS
from hp_plugin.compare.entries.suites import MODES, SUITES
from hp_plugin.training.option_groups import BACKENDS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `compare` to a parser or subparser."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help=f"{', '.join(MODELS)}, or FILE.json of the reference trainer's options")
    what.add_argument("--suite", choices=SUITES, help="a documented set of models and layouts")
    parser.add_argument("--layouts", nargs="+", help='"tp=8,pp=2" "grid=4x4,exchange=scores" …; the first is the base')
    parser.add_argument("--mode", choices=MODES, help="train (default), forward, both (default of a suite), or decode")
    parser.add_argument(
        "--context", type=int, nargs="+", help="tokens that --mode decode finds cached (default: 2048, or the suite's)"
    )
    parser.add_argument("--ranks", type=int, help="processes to start (default: what the largest layout takes)")
    parser.add_argument("--global-batch", type=int, help="sequences per step, in place of the model's")
    parser.add_argument(
        "--attention-backend", choices=BACKENDS, help="core attention of all layouts (default: auto, stock's choice)"
    )
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a layout per round")
    parser.add_argument("--rounds", type=int, default=3, help="rounds over all layouts")
    parser.add_argument("--out", type=Path, default=Path("compare"), help="directory; every model has one of its own")
    parser.add_argument("--trace", action="store_true", help="also write a Chrome trace of every layout (Perfetto)")
    parser.add_argument(
        "--predict", action="store_true", help="also measure the machine and put the planner's predictions beside (CPU)"
    )
    parser.add_argument("--into", type=Path, help="also put the tables into this Markdown file, between its markers")


def run(args: argparse.Namespace) -> int:
    """Compares, shows and draws; 1 if a rank failed.

    Raises:
        ValueError: an option, model or layout that cannot run; no rank was started and no file written.
    """
    with warnings.catch_warnings():
        # Megatron-Core says on import which optional packages are missing; `hp-plugin doctor` says it once.
        warnings.simplefilter("ignore")
        from hp_plugin.compare.comparison import compare

        return compare(args)
