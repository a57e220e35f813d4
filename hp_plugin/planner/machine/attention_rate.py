"""How long a fused attention kernel takes, from published rates by sequence length and head dimension."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, exp, log
from typing import Any

from hp_plugin.planner.machine.parameter import positive
from hp_plugin.refusal import shown

Rates = Mapping[int, Mapping[int, float]]
"""Operations per second by head dimension, then by sequence length."""

BACKWARD_FACTOR = 2.5
"""Backward operations per forward operation of fused attention (it computes the scores again)."""


@dataclass(frozen=True)
class Occupancy:
    """How a kernel slows down when it has few tiles: x / (x + half_waves) with x waves of tiles on the GPU's SMs.

    The published rates were taken at `reference_waves`, so the factor is 1 there.
    """

    tile_rows: int
    half_waves: float
    reference_waves: float
    multiprocessors: int

    def factor(self, heads: int, queries: int, causal: bool) -> float:
        """Share of the published rate that `heads` (samples included) of `queries` rows reach."""
        waves = heads * ceil(queries / self.tile_rows) * (0.5 if causal else 1.0) / self.multiprocessors
        reference = self.reference_waves / (self.reference_waves + self.half_waves)
        return waves / (waves + self.half_waves) / reference


@dataclass(frozen=True)
class FusedHeadDims:
    """The largest head dimension that a fused kernel takes, in training and in a forward pass alone; None: any."""

    training: int | None = None
    forward: int | None = None

    def include(self, width: int, training: bool) -> bool:
        """Whether the kernel takes heads of this width."""
        largest = self.training if training else self.forward
        return largest is None or width <= largest


ANY_HEAD_DIM = FusedHeadDims()
"""Of a kernel without limits."""


class AttentionKernel:
    """One fused kernel's measured rates, forward alone and forward with backward.

    Args:
        forward, forward_backward: rates for causal and for full attention; the second may lack head dimensions and
            lengths, for which its ratio to the first at the nearest measured point stands in.
        head_dims: the head dimensions that the kernel takes.
    """

    def __init__(
        self,
        name: str,
        forward: Mapping[bool, Rates],
        forward_backward: Mapping[bool, Rates],
        head_dims: FusedHeadDims,
        occupancy: Occupancy,
        source: str,
    ) -> None:
        self.name = name
        self.head_dims = head_dims
        self.source = source
        self._forward = forward
        self._both = forward_backward
        self._occupancy = occupancy

    @classmethod
    def from_json(cls, name: str, entry: Mapping[str, Any], occupancy: Occupancy) -> AttentionKernel:
        """Reads one entry of a table of kernels (10¹² operations per second).

        `max_head_dim` holds in training, and forward, too, where no `max_head_dim_forward` says otherwise (null: any).
        """

        def rates(direction: str, mask: str) -> Rates:
            return {
                _size(width): {_size(length): positive(rate, "rate") * 1e12 for length, rate in by_mask[mask].items()}
                for width, by_mask in entry[direction].items()
            }

        for direction in ("forward", "forward_backward"):
            for mask in ("causal", "full"):
                if not rates(direction, mask) or not all(rates(direction, mask).values()):
                    raise ValueError(f"attention table, {name}, {direction}, {mask}: no rates")
        return cls(
            name,
            {causal: rates("forward", mask) for causal, mask in ((True, "causal"), (False, "full"))},
            {causal: rates("forward_backward", mask) for causal, mask in ((True, "causal"), (False, "full"))},
            _head_dims(entry),
            occupancy,
            str(entry["source"]),
        )

    def seconds(
        self, pairs: float, heads: int, queries: int, keys: int, width: int, causal: bool, backward: bool
    ) -> float:
        """Seconds of one pass.

        Args:
            pairs: query-key pairs per head that are not masked.
            heads: query heads, samples included. width: head dimension.
        """
        operations = 4.0 * pairs * heads * width
        occupancy = self._occupancy.factor(heads, queries, causal)
        forward = operations / (self._rate(self._forward[causal], width, keys) * occupancy)
        if not backward:
            return forward
        both = (1 + BACKWARD_FACTOR) * operations / (self._both_rate(width, keys, causal) * occupancy)
        return both - forward

    def _both_rate(self, width: int, keys: int, causal: bool) -> float:
        table, forward = self._both[causal], self._forward[causal]
        nearest_width = min(table, key=lambda known: (abs(known - width), known))
        lengths = table[nearest_width]
        nearest = min(max(keys, min(lengths)), max(lengths))
        ratio = _along(lengths, nearest) / _along(forward[nearest_width], nearest)
        return ratio * self._rate(forward, width, keys)

    @staticmethod
    def _rate(rates: Rates, width: int, keys: int) -> float:
        """Straight between head dimensions; below the smallest the padding is paid for."""
        widths = sorted(rates)
        if width <= widths[0]:
            return _along(rates[widths[0]], keys) * width / widths[0]
        if width >= widths[-1]:
            return _along(rates[widths[-1]], keys)
        upper = next(known for known in widths if known >= width)
        lower = widths[widths.index(upper) - 1]
        share = (width - lower) / (upper - lower)
        return (1 - share) * _along(rates[lower], keys) + share * _along(rates[upper], keys)


def _size(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 10**9:
        raise ValueError(f"a head dimension or length must be a positive integer, got {shown(text)}")
    return int(text)


def _head_dims(entry: Mapping[str, Any]) -> FusedHeadDims:
    training = int(positive(entry["max_head_dim"], "max_head_dim"))
    forward = entry.get("max_head_dim_forward", training)
    return FusedHeadDims(training, None if forward is None else int(positive(forward, "max_head_dim_forward")))


def _along(lengths: Mapping[int, float], keys: int) -> float:
    """Rate at a sequence length, straight on log axes; proportional to the length below the shortest."""
    known = sorted(lengths)
    if keys <= known[0]:
        return lengths[known[0]] * keys / known[0]
    if keys >= known[-1]:
        return lengths[known[-1]]
    upper = next(length for length in known if length >= keys)
    lower = known[known.index(upper) - 1]
    share = log(keys / lower) / log(upper / lower)
    return exp((1 - share) * log(lengths[lower]) + share * log(lengths[upper]))
