"""Data-parallel traffic beside the passes: what it holds up, what it takes from kernels, and when it is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hp_plugin.planner.counts.gradients import chunk_sync
from hp_plugin.planner.counts.share import Share
from hp_plugin.planner.counts.stages import RankParameters
from hp_plugin.planner.seconds.pricing import Cost, Pricer
from hp_plugin.planner.seconds.timeline import Event, Timeline

Place = tuple[int, int]
"""(pipeline rank, chunk)."""


@dataclass(frozen=True)
class Overlap:
    """What `hp_plugin.planner.seconds.timeline.Pipeline` and `gradient_ends` need to know, by place.

    Args:
        gates: (seconds until the chunk's gathered weights are there, share of its first pass that then remains).
        first_extra, last_extra: seconds that gathers take from the first forward pass, reductions from the last
            backward pass, of kernels that share the multiprocessors.
        reductions: seconds of each gradient bucket.
    """

    gates: dict[Place, tuple[float, float]]
    first_extra: dict[Place, float]
    last_extra: dict[Place, float]
    reductions: dict[Place, list[float]]


def plan_overlap(
    share: Share,
    pricer: Pricer,
    chunks: Sequence[Sequence[RankParameters]],
    forward: Sequence[Cost],
    backward: Sequence[Cost],
) -> Overlap:
    """Times of the data-parallel collectives of every chunk, gathers one behind the other from the step's start."""
    taken = pricer.hardware["collective_multiprocessors"] / pricer.hardware["multiprocessors"]
    overlap = Overlap({}, {}, {}, {})
    for rank, mine in enumerate(chunks):
        until = 0.0
        for chunk, parameters in enumerate(mine):
            sync = chunk_sync(share, parameters, rank, chunk)
            stage = chunk * len(chunks) + rank
            gathered = sum(pricer.collective(each) for each in sync.weights)
            if sync.weights:
                until += gathered
                overlap.gates[rank, chunk] = (until, 1.0 / len(sync.weights))
                overlap.first_extra[rank, chunk] = taken * min(gathered, forward[stage].seconds)
            if sync.gradients:
                times = [pricer.collective(each) for each in sync.gradients]
                overlap.reductions[rank, chunk] = times
                overlap.last_extra[rank, chunk] = taken * min(sum(times), backward[stage].seconds)
    return overlap


def gradient_ends(line: Timeline, overlap: Overlap) -> list[float]:
    """When each rank's last gradient bucket is reduced; the reductions go onto the timeline.

    A chunk's buckets fill evenly during its last backward pass; a rank reduces one bucket at a time.
    """
    ends = []
    for rank, finish in enumerate(line.finish):
        at = 0.0
        for chunk, start, end in sorted(line.last_backward[rank], key=lambda last: last[2]):
            times = overlap.reductions.get((rank, chunk), [])
            for number, seconds in enumerate(times):
                begin = max(at, start + (end - start) * (number + 1) / len(times))
                at = begin + seconds
                line.events.append(Event(rank, "gradients", f"reduce chunk {chunk}, bucket {number}", begin, at))
        ends.append(max(at, finish))
    return ends
