"""Moves tokens from one way of spreading a micro-batch over the ranks of a TP group to another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Region(NamedTuple):
    """A run of positions of a range of samples; a rank holds its regions, `[positions, samples, ..]`, in a row."""

    positions: range
    samples: range

    def common(self, other: Region) -> Region:
        """Where both are."""
        return Region(_common(self.positions, other.positions), _common(self.samples, other.samples))

    def __bool__(self) -> bool:
        return bool(self.positions) and bool(self.samples)

    def within(self, held: Tensor, start: int, around: Region) -> Tensor:
        """The view of this region in a tensor that holds the region `around` from row `start` on."""
        row = start + self.positions.start - around.positions.start
        first = self.samples.start - around.samples.start
        return held[row : row + len(self.positions), first : first + len(self.samples)]


def _common(one: range, other: range) -> range:
    start = max(one.start, other.start)
    return range(start, max(start, min(one.stop, other.stop)))


@dataclass(frozen=True)
class Resharding:
    """One all-to-all over `group`, of whose rank number r `before[r]` and `after[r]` say what it holds."""

    group: dist.ProcessGroup
    before: list[list[Region]]
    after: list[list[Region]]

    def move(self, held: Tensor, back: bool = False) -> Tensor:
        """[positions, samples, ..] of this rank before to what it has after; `back`: the other way."""
        before, after = (self.after, self.before) if back else (self.before, self.after)
        me, ranks = self.group.rank(), range(self.group.size())
        rest = held.shape[2:]
        sent = [[piece for piece, _ in _pieces(held, before[me], after[rank])] for rank in ranks]
        rows = sum(len(region.positions) for region in after[me])
        received = held.new_empty((rows, len(after[me][0].samples), *rest))
        places = [[place for place, _ in _pieces(received, after[me], before[rank])] for rank in ranks]
        incoming = held.new_empty(received.numel())
        dist.all_to_all_single(
            incoming,
            torch.cat([piece.reshape(-1) for pieces in sent for piece in pieces]),
            [sum(place.numel() for place in one) for one in places],
            [sum(piece.numel() for piece in one) for one in sent],
            group=self.group,
        )
        flat = [place for one in places for place in one]
        for place, values in zip(flat, incoming.split([place.numel() for place in flat]), strict=True):
            place.copy_(values.view(place.shape))
        return received


def _pieces(held: Tensor, own: list[Region], other: list[Region]) -> list[tuple[Tensor, Region]]:
    """The views of what a rank holds that lie in another's regions, by position."""
    found, start = [], 0
    for around in own:
        for region in other:
            common = around.common(region)
            if common:
                found.append((common.within(held, start, around), common))
        start += len(around.positions)
    return sorted(found, key=lambda piece: piece[1].positions.start)
