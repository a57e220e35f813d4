"""From the options of `hp-plugin compare` to reports; all is checked before a rank starts or a file is written."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from hp_plugin.compare.entries.catalogue import MODELS, CatalogueModel, catalogue_model
from hp_plugin.compare.entries.decoding import check_decodes
from hp_plugin.compare.entries.entrant import Entrant, NotPossibleError, enter, smallest_world
from hp_plugin.compare.entries.suites import CONTEXT, DECODE, DECODE_SUITES, MODES, SUITES, Comparison, decode_mode
from hp_plugin.compare.job import Job
from hp_plugin.compare.report.figure import draw
from hp_plugin.compare.report.page import check_page, load_reports, put_into
from hp_plugin.compare.report.table import show
from hp_plugin.compare.start import RankFailedError, run_on_ranks

_WRITTEN = ("report.json", "report.md", "report.png", "machine.json")


def compare(args: argparse.Namespace) -> int:
    """Runs every comparison that is asked for; 1 as soon as a rank fails.

    Raises:
        ValueError: an option, model or layout that cannot run.
    """
    for name in ("ranks", "steps", "rounds", "global_batch", "context"):
        given = getattr(args, name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be positive, got {value}")
    if find_spec("matplotlib") is None:
        raise ValueError("compare draws with matplotlib, which is not installed: pip install 'hp-plugin[plot]'")
    if args.into is not None:
        check_page(args.into)
    if args.predict and torch.cuda.is_available():
        raise ValueError(
            "--predict describes machines without GPUs; on GPUs, give `hp-plugin plan` your nccl-tests output and GEMM "
            "table (docs/planner.md)"
        )
    jobs = [_job(comparison, args) for comparison in _comparisons(args)]
    if args.predict and any(ranks == 1 for _, ranks in jobs):
        raise ValueError("--predict measures collectives, which takes at least 2 ranks: raise --ranks")
    for job, ranks in jobs:
        if not _run(job, ranks):
            return 1
    if args.into is not None:
        put_into(args.into, load_reports(args.out))
    return 0


def _comparisons(args: argparse.Namespace) -> tuple[Comparison, ...]:
    if args.suite is None:
        if not args.layouts:
            raise ValueError('--model needs --layouts, for example --layouts "tp=8,pp=2" "grid=4x4"')
        contexts = tuple(dict.fromkeys(args.context or [CONTEXT]))
        return (Comparison(args.model, tuple(args.layouts), MODES[args.mode or "train"], contexts),)
    if args.layouts:
        raise ValueError(f"--suite {args.suite} has its own layouts: give --model with --layouts")
    changes: dict[str, Any] = {}
    if args.mode is not None:
        changes["modes"] = MODES[args.mode]
    if args.context is not None:
        changes["contexts"] = tuple(dict.fromkeys(args.context))
    suites = DECODE_SUITES if args.mode == DECODE else SUITES
    if args.suite not in suites:
        raise ValueError(f"--suite {args.suite} has no layouts that decode: {', '.join(suites)} have")
    return tuple(replace(one, **changes) for one in suites[args.suite])


def _job(comparison: Comparison, args: argparse.Namespace) -> tuple[Job, int]:
    model = catalogue_model(comparison.model)
    if args.global_batch is not None:
        model = replace(model, batch=args.global_batch)
    if args.attention_backend is not None:
        model = replace(model, options=model.options | {"attention_backend": args.attention_backend})
    texts = list(comparison.layouts)
    if len(set(texts)) < len(texts):
        raise ValueError("--layouts: one is given twice")
    ranks = args.ranks or smallest_world(texts)
    entrants, impossible = _enter(model, texts, ranks)
    modes = comparison.modes
    if DECODE in modes:
        if args.predict or args.trace:
            raise ValueError("--mode decode has neither --predict nor --trace: leave them out")
        for entrant in entrants:
            check_decodes(entrant, max(comparison.contexts), ranks)
        modes = tuple(map(decode_mode, comparison.contexts))
    name = comparison.model if comparison.model in MODELS else Path(comparison.model).stem
    job = Job(name, model.scale, tuple(entrants), impossible, modes, args.steps, args.rounds)
    return replace(job, out=args.out / name, trace=args.trace, predict=args.predict), ranks


def _enter(model: CatalogueModel, texts: list[str], ranks: int) -> tuple[list[Entrant], dict[str, str]]:
    entrants: list[Entrant] = []
    impossible: dict[str, str] = {}
    for text in texts:
        try:
            entrants.append(enter(model, text, ranks))
        except NotPossibleError as refusal:
            impossible[text] = str(refusal)
    if not entrants:
        raise ValueError(f"no layout can run: {'; '.join(f'{text}: {words}' for text, words in impossible.items())}")
    return entrants, impossible


def _run(job: Job, ranks: int) -> bool:
    """One comparison, from start to picture; False if a rank failed."""
    job.out.mkdir(parents=True, exist_ok=True)
    for name in _WRITTEN:
        (job.out / name).unlink(missing_ok=True)
    failure = None
    try:
        run_on_ranks(job, ranks)
    except RankFailedError as failed:
        failure = str(failed)
    finally:
        kept = _finish(job)
    if failure is not None:
        where = f"; partial results are in {job.out}" if kept else ""
        print(f"hp-plugin compare: error: {failure}{where}", file=sys.stderr)
    return failure is None


def _finish(job: Job) -> bool:
    """Shows and draws what there is, partial or not; False if nothing was timed."""
    path = job.out / "report.json"
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr)
    if not path.exists():
        return False
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    draw(report, job.out / "report.png")
    show(report)
    return True
