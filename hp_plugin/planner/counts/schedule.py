"""In which order the ranks of a pipeline run their forward and backward passes: Megatron-Core's schedules.

Source: `megatron.core.pipeline_parallel.schedules`, `forward_backward_pipelining_without_interleaving` and
`..._with_interleaving`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple


class Task(NamedTuple):
    """One pass of one micro-batch through one model chunk of a pipeline rank."""

    backward: bool
    chunk: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{'B' if self.backward else 'F'}{self.micro_batch}" + (f".{self.chunk}" if self.chunk else "")


@lru_cache(maxsize=1024)
def pipeline_order(rank: int, pp: int, vpp: int, micro_batches: int, training: bool) -> tuple[Task, ...]:
    """The passes of one pipeline rank, in order: 1F1B, interleaved for vpp > 1, or forward only.

    Raises:
        ValueError: an interleaved schedule whose micro-batches are no multiple of pp.
    """
    if vpp > 1 and micro_batches % pp:
        raise ValueError(f"{micro_batches} micro-batches are no multiple of pp={pp}, as interleaving needs")
    total = micro_batches * vpp
    if not training:
        return tuple(_task(k, pp, vpp, backward=False) for k in range(total))
    warm_up = pp - rank - 1 if vpp == 1 else (pp - rank - 1) * 2 + (vpp - 1) * pp
    warm_up = min(warm_up, total)
    order = [_task(k, pp, vpp, backward=False) for k in range(warm_up)]
    for k in range(total - warm_up):
        order.append(_task(k + warm_up, pp, vpp, backward=False))
        order.append(_task(k, pp, vpp, backward=True))
    order += [_task(k, pp, vpp, backward=True) for k in range(total - warm_up, total)]
    return tuple(order)


def _task(k: int, pp: int, vpp: int, backward: bool) -> Task:
    """The k-th forward (or backward) pass of any rank: pp micro-batches through one chunk, then the next chunk."""
    if vpp == 1:
        return Task(backward, 0, k)
    chunk = (k // pp) % vpp
    micro_batch = k // (pp * vpp) * pp + k % pp
    return Task(backward, vpp - 1 - chunk if backward else chunk, micro_batch)


def peak_in_flight(order: Sequence[Task], weights: Sequence[float]) -> float:
    """The most activations a rank holds at once: `weights[chunk]` from a forward pass to its backward pass."""
    held = peak = 0.0
    for task in order:
        held += -weights[task.chunk] if task.backward else weights[task.chunk]
        peak = max(peak, held)
    return peak
