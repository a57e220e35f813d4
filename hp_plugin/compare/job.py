"""What every rank of `hp-plugin compare` does: the loss gate, then rounds over all layouts in turns."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from hp_plugin.bench.gate import measure_losses, measure_twin_losses, require_equal_losses, tolerance
from hp_plugin.bench.layouts import Entrant
from hp_plugin.bench.machine import describe_machine, write_machine
from hp_plugin.bench.report import Results, write_report
from hp_plugin.bench.timing import timed, traced
from hp_plugin.cost.hardware import load_hardware
from hp_plugin.training.distributed import prepare_device
from hp_plugin.training.transformer import params_dtype


@dataclass(frozen=True)
class Job:
    """What all ranks are told.

    Args:
        entrants: the layouts, the first one being the baseline.
        impossible: layouts that stock Megatron-Core refuses, and its words.
        modes: `forward`, `train`, or both.
        steps: timed steps of a layout per round and mode. rounds: rounds over all layouts.
        out: directory of the report. trace: whether to write a profiler trace of every layout.
        predict: whether to measure the machine, too, and to put the planner's predictions beside every layout.
    """

    model: str
    scale: str
    entrants: tuple[Entrant, ...]
    impossible: dict[str, str] = field(default_factory=dict)
    modes: tuple[str, ...] = ("train",)
    steps: int = 3
    rounds: int = 3
    out: Path = Path("compare")
    trace: bool = False
    predict: bool = False

    @property
    def machine_path(self) -> Path:
        """Where the description of the machine goes."""
        return self.out / "machine.json"

    def trace_path(self, number: int, mode: str) -> Path:
        """Where the trace of layout number `number` goes."""
        name = "".join(letter if letter.isalnum() else "-" for letter in self.entrants[number].name)
        return self.out / f"trace-{name}-{mode}.json"


def run_rank(job: Job) -> None:
    """The body of one rank; rank 0 writes the report after every round, marked partial until the last.

    Raises:
        LossMismatchError: the losses of two layouts differ.
    """
    with _default_group():
        results = Results(job)
        pass_gate(job, results)
        if job.predict:
            _say("rates of this machine")
            machine = describe_machine(params_dtype(job.entrants[0].config))
            if dist.get_rank() == 0:
                write_machine(machine, job.machine_path)
                results.hardware = load_hardware(str(job.machine_path))
        for number in range(job.rounds):
            for entrant in job.entrants:
                _say(f"round {number + 1} of {job.rounds}: {entrant.name}")
                for mode, samples in timed(entrant, job.modes, job.steps).items():
                    results.samples[mode][entrant.name] += samples
            if dist.get_rank() == 0:
                write_report(results, complete=number + 1 == job.rounds and not job.trace)
        if job.trace:
            _trace(job)
            if dist.get_rank() == 0:
                write_report(results, complete=True)


def pass_gate(job: Job, results: Results) -> None:
    """Measures every layout's losses, and refuses those that differ; to be called on all ranks.

    Raises:
        LossMismatchError: two layouts, or a literal one and its twin, compute different losses.
    """
    training = "train" in job.modes
    first = job.entrants[0]
    # A literal (`local`) first layout has no exact one to be held to but its twin.
    reference = next((entrant for entrant in job.entrants if entrant.exact), first)
    for entrant in job.entrants:
        _say(f"loss of {entrant.name}")
        results.losses[entrant.name] = measure_losses(entrant, training)
    for entrant in job.entrants:
        found, limit = results.losses[entrant.name], tolerance(entrant.config)
        if entrant.exact:
            require_equal_losses(entrant.name, found, reference.name, results.losses[reference.name], limit)
            continue
        _say(f"loss of what {entrant.name} must equal")
        twin = f"stock with n times the heads for {entrant.name}"
        results.twin_losses[entrant.name] = measure_twin_losses(entrant, training)
        require_equal_losses(entrant.name, found, twin, results.twin_losses[entrant.name], limit)


def _trace(job: Job) -> None:
    for number, entrant in enumerate(job.entrants):
        for mode in job.modes:
            _say(f"trace of {entrant.name}, {mode}")
            traced(entrant, mode, job.trace_path(number, mode))


@contextmanager
def _default_group() -> Iterator[None]:
    """NCCL where there are GPUs, gloo on the CPU; the launcher has said where to meet."""
    prepare_device()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if cuda else "gloo")
    yield
    # Only after success: a failing rank must not wait here for the others.
    dist.destroy_process_group()


def _say(what: str) -> None:
    """Progress, on one line of a terminal or a line each in a log."""
    if dist.get_rank() == 0:
        terminal = sys.stderr.isatty()
        print(f"\r\x1b[K{what}" if terminal else what, end="" if terminal else "\n", file=sys.stderr, flush=True)
