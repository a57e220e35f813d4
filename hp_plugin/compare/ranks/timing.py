"""Timed steps of one layout, gathered from all ranks."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hp_plugin.compare.entries.decoding import TOKENS
from hp_plugin.compare.entries.entrant import Entrant
from hp_plugin.compare.ranks.decode import Decoder, decoding
from hp_plugin.compare.ranks.running import batches, built
from hp_plugin.compare.ranks.traffic import Traffic, counted
from hp_plugin.training.peak_memory import peak_bytes, reset_peak
from hp_plugin.training.step import Trainer, forward_step, train_step

Sample = dict[str, Any]
"""One step: `step_s`, `comm_s` and `sent_bytes` by "axis/kind", `pipeline_wait_s`, `peak_bytes`."""


def timed(entrant: Entrant, modes: tuple[str, ...], steps: int) -> dict[str, list[Sample]]:
    """By mode, `steps` timed steps of a freshly built model, each mode after a warm-up step of its own."""
    found: dict[str, list[Sample]] = {}
    with built(entrant.config) as trainer:
        for mode in modes:
            run_step(trainer, mode)
            found[mode] = [_sample(trainer, mode) for _ in range(steps)]
    return found


def timed_decoding(entrant: Entrant, context: int, steps: int) -> list[Sample]:
    """`steps` samples of a decode step behind cached prompts, means of several tokens each, after a warm-up."""
    with decoding(entrant, context) as decoder:
        decoder.steps()
        return [_decode_sample(decoder) for _ in range(steps)]


def _decode_sample(decoder: Decoder) -> Sample:
    dist.barrier()
    reset_peak()
    with counted() as traffic:
        began = time.perf_counter()
        decoder.steps()
        seconds = time.perf_counter() - began
    sample = _over_ranks(seconds, traffic)
    for part in ("step_s", "pipeline_wait_s"):
        sample[part] /= TOKENS
    for part in ("comm_s", "sent_bytes"):
        sample[part] = {key: value / TOKENS for key, value in sample[part].items()}
    held: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(held, decoder.cached_bytes())
    return sample | {"cache_bytes": max(held)}


def run_step(trainer: Trainer, mode: str) -> None:
    """One global batch, forward alone or a whole training step."""
    step = train_step if mode == "train" else forward_step
    step(trainer, batches(trainer))
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()


def traced(entrant: Entrant, mode: str, path: Path) -> None:
    """Writes the Chrome trace of one step of rank 0, after a warm-up step."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with built(entrant.config) as trainer:
        run_step(trainer, mode)
        if dist.get_rank():
            run_step(trainer, mode)
            return
        with torch.profiler.profile(activities=activities) as profile:
            run_step(trainer, mode)
        profile.export_chrome_trace(str(path))


def _sample(trainer: Trainer, mode: str) -> Sample:
    dist.barrier()
    reset_peak()
    with counted() as traffic:
        began = time.perf_counter()
        run_step(trainer, mode)
        seconds = time.perf_counter() - began
    return _over_ranks(seconds, traffic)


def _over_ranks(seconds: float, traffic: Traffic) -> Sample:
    """The slowest rank's seconds, the largest memory; time in collectives and bytes averaged over ranks."""
    own = {
        "step_s": seconds,
        "comm_s": {"/".join(key): value for key, value in traffic.seconds.items()},
        "sent_bytes": {"/".join(key): value for key, value in traffic.sent().items() if value},
        "pipeline_wait_s": traffic.pipeline_seconds(),
        "peak_bytes": peak_bytes(),
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
    peaks = [rank["peak_bytes"] for rank in ranks if rank["peak_bytes"] is not None]
    return {
        "step_s": max(rank["step_s"] for rank in ranks),
        "pipeline_wait_s": sum(rank["pipeline_wait_s"] for rank in ranks) / len(ranks),
        "peak_bytes": max(peaks, default=None),
        **mean,
    }
