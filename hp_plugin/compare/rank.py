"""What every rank of `hp-plugin compare` does: the loss gate, then rounds over all layouts in turns."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from hp_plugin.compare.job import Job
from hp_plugin.compare.ranks.gate import (
    measure_decode_loss,
    measure_losses,
    measure_twin_losses,
    require_equal_losses,
    tolerance,
)
from hp_plugin.compare.ranks.timing import timed, timed_decoding, traced
from hp_plugin.compare.rates.machine import describe_machine, write_machine
from hp_plugin.compare.results import Results, write_report
from hp_plugin.planner.machine.hardware import load_hardware
from hp_plugin.training.distributed import prepare_device
from hp_plugin.training.transformer import params_dtype


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
                for mode, samples in timed(entrant, job.training_modes, job.steps).items():
                    results.samples[mode][entrant.name] += samples
                for mode, context in job.contexts.items():
                    results.samples[mode][entrant.name] += timed_decoding(entrant, context, job.steps)
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
        found = measure_losses(entrant, training) if job.training_modes else []
        results.losses[entrant.name] = [*found, *([measure_decode_loss(entrant)] if job.contexts else [])]
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
        for mode in job.training_modes:
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
