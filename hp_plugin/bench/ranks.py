"""The ranks of `hp-plugin compare`: same weights and tokens for every layout, equal losses first, then timed rounds."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from hp_plugin.bench.report import write_report
from hp_plugin.bench.traffic import Traffic, counted, group_axes
from hp_plugin.training.config import TrainingConfig
from hp_plugin.training.distributed import prepare_device, running_ranks
from hp_plugin.training.step import Trainer, build_trainer, forward_step, train_step
from hp_plugin.training.transformer import build_transformer_config

LOSS_TOLERANCE = 1e-4
"""Relative; in fp32 another order of summation moves a loss by less than a hundredth of this."""


@dataclass(frozen=True)
class Job:
    """What all ranks are told: layouts by name in the order given, and how often to time each."""

    model: str
    layouts: dict[str, TrainingConfig]
    mode: str
    steps: int
    rounds: int
    out: str


def run_rank(job: Job) -> None:
    """The body of one rank; rank 0 writes the report after every round, marked partial until the last.

    Raises:
        ValueError: the losses of two layouts differ.
    """
    prepare_device()
    cuda = torch.cuda.is_available()
    if not cuda:
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if cuda else "gloo")
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in job.layouts}
    losses = {name: _losses(config, job.mode) for name, config in job.layouts.items()}
    require_equal_losses(losses)
    for round_ in range(job.rounds):
        for name, config in job.layouts.items():
            samples[name] += _timed(config, job)
        if dist.get_rank() == 0:
            write_report(job, losses, samples, complete=round_ + 1 == job.rounds)
    dist.destroy_process_group()


def require_equal_losses(losses: dict[str, list[float]]) -> None:
    """Refuses to go on where a layout computes another function than the first one.

    Raises:
        ValueError: a loss is more than `LOSS_TOLERANCE` away; both layouts and their losses are named.
    """
    (first, expected), *others = losses.items()
    for name, found in others:
        for want, have in zip(expected, found, strict=True):
            if not abs(have - want) <= LOSS_TOLERANCE * abs(want):
                raise ValueError(f"nothing was timed: {name} has loss {found} where {first} has {expected}")


def _losses(config: TrainingConfig, mode: str) -> list[float]:
    """The loss of the first batch; in training also the one after a step, which a wrong gradient would change."""
    with running_ranks(config) as device:
        trainer = build_trainer(config, build_transformer_config(config), device)
        found = [_everywhere(forward_step(trainer, batches(trainer)))]
        if mode == "train":
            train_step(trainer, batches(trainer))
            found.append(_everywhere(forward_step(trainer, batches(trainer))))
    return found


def _everywhere(loss: Tensor | None) -> float:
    """The loss of the last pipeline stage, on every rank."""
    known: list[float | None] = [None] * dist.get_world_size()
    dist.all_gather_object(known, None if loss is None else float(loss))
    return next(value for value in known if value is not None)


def batches(trainer: Trainer) -> Iterator[dict[str, Tensor]]:
    """This rank's micro-batches of one global batch of random tokens [B, s], the same batch under every layout."""
    config = trainer.config
    generator = torch.Generator().manual_seed(config.seed)
    shape = (trainer.batch_size, config.seq_length + 1)
    tokens = torch.randint(config.padded_vocab_size, shape, generator=generator)
    own = tokens.chunk(parallel_state.get_data_parallel_world_size())[parallel_state.get_data_parallel_rank()]
    for part in own.split(config.micro_batch_size):
        positions = torch.arange(config.seq_length).expand(len(part), -1)
        mask = torch.ones(len(part), config.seq_length)
        yield {"tokens": part[:, :-1], "labels": part[:, 1:], "loss_mask": mask, "position_ids": positions}


def _timed(config: TrainingConfig, job: Job) -> list[dict[str, Any]]:
    """One warm-up step and `job.steps` timed ones of a freshly built layout; gathered from all ranks."""
    with running_ranks(config) as device:
        trainer = build_trainer(config, build_transformer_config(config), device)
        step = train_step if job.mode == "train" else forward_step
        step(trainer, batches(trainer))
        axes, found = group_axes(), []
        for _ in range(job.steps):
            dist.barrier()
            with counted(axes) as traffic:
                began = time.perf_counter()
                step(trainer, batches(trainer))
                if device.type == "cuda":
                    torch.cuda.synchronize()
                seconds = time.perf_counter() - began
            found.append(_sample(seconds, traffic, device))
    return found


def _sample(seconds: float, traffic: Traffic, device: torch.device) -> dict[str, Any]:
    """One step over all ranks: the slowest rank's seconds, and communication averaged over ranks."""
    cuda = device.type == "cuda"
    # Resident memory never falls: on the CPU it is the peak of all layouts so far in this process.
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    own = {
        "step_s": seconds,
        "comm_s": {"/".join(key): value for key, value in traffic.seconds.items()},
        "sent_bytes": {"/".join(key): value for key, value in traffic.sent().items()},
        "peak_bytes": peak,
    }
    ranks: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(ranks, own)
    mean = {
        part: {
            key: sum(rank[part].get(key, 0.0) for rank in ranks) / len(ranks)
            for key in sorted({key for rank in ranks for key in rank[part]})
        }
        for part in ("comm_s", "sent_bytes")
    }
    return {"step_s": max(rank["step_s"] for rank in ranks), "peak_bytes": max(r["peak_bytes"] for r in ranks), **mean}
