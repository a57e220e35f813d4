"""The steady state of generation through a pipeline."""

from __future__ import annotations

from collections.abc import Sequence


def decode_period(stages: Sequence[float], transfer: float, micro_batches: int) -> float:
    """Seconds in which every sequence gets one token.

    A micro-batch's next token needs its last one, so a round takes at least its way through all stages and back; with
    enough micro-batches in flight the slowest stage (kernels, and sends that the next one waits for) sets the pace.

    Args:
        stages: seconds of one micro-batch in each stage. transfer: seconds between stages.
    """
    hops = transfer if len(stages) > 1 else 0.0
    round_trip = sum(stages) + hops * len(stages)
    return max(round_trip, micro_batches * (max(stages) + hops))
