"""Which part of a micro-batch a rank works on between the ends of a block of layers, and how it gets there and back.

Letters: s sequence, b micro-batch, D hidden size; m × n the grid, P = m · n, (i, j) a rank's coordinates. Outside of a
block every rank holds what stock's TP = P gives it: `[s, b, D]`, or `[s/P, b, D]` with sequence parallelism. Inside it
holds its share: the n ranks of a dim group different tokens, the m ranks of a head group the same ones, or, with
sequence parallelism, an m-th each.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hp_plugin.exchange.sequence.chunks import chunks_of, in_order, own_tokens
from hp_plugin.exchange.weights.resharding import Region, Resharding
from hp_plugin.grid.groups import HeadDimGroups


@dataclass(frozen=True)
class Share:
    """This rank's part of a micro-batch of b samples of s tokens, which the n ranks of a dim group divide.

    Args:
        groups: the rank's grid.
        s, b: the whole micro-batch.
        sequence_parallel: whether the sequence is spread over the ranks that hold the same tokens otherwise.
    """

    groups: HeadDimGroups
    s: int
    b: int
    sequence_parallel: bool

    def own(self, states: Tensor) -> Tensor:
        """What stock's rank holds -> this rank's share, [s, b/n, D] or [s/n, b, D], or an m-th of its sequence."""
        return self._ends.apply(states, self, True)

    def whole(self, states: Tensor) -> Tensor:
        """The inverse of `own`; every rank gets the whole gradient."""
        return self._ends.apply(states, self, False)

    def whole_last(self, own: Tensor) -> Tensor:
        """Every sample's last token, [1, b, ..], from the last that each rank has of its share, without a gradient."""
        return self.join_last(_side_by_side(own, self))

    def own_padding(self, mask: Tensor | None) -> Tensor | None:
        """The same of a padding mask, `[b, s]`, or `[b, s/P]` with sequence parallelism."""
        if mask is None:
            return None
        by_position = mask.transpose(0, 1)
        if self.sequence_parallel:
            own = self.resharding.move(by_position.to(torch.uint8)).to(mask.dtype)
        else:
            own = self.cut(by_position)
        return own.transpose(0, 1)

    @property
    def shape(self) -> tuple[int, int]:
        """Positions and samples of this rank's share."""
        raise NotImplementedError

    def cut(self, states: Tensor) -> Tensor:
        """This rank's part of what all ranks hold, [s, b, ..], contiguous."""
        raise NotImplementedError

    def join(self, shares: Tensor) -> Tensor:
        """The shares of a dim group, [n, ..] -> [s, b, ..], contiguous."""
        raise NotImplementedError

    def join_last(self, lasts: Tensor) -> Tensor:
        """The last token of every share of a dim group, [n, 1, ..] -> every sample's last, [1, b, ..], contiguous."""
        return self.join(lasts)

    def regions(self, tp_rank: int) -> list[Region]:
        """With sequence parallelism: what a rank of the TP group has inside, in its order."""
        raise NotImplementedError

    @property
    def _parts(self) -> int:
        """Into how many parts a head group cuts the sequence of its share."""
        return self.groups.grid.m if self.sequence_parallel else 1

    @property
    def _ends(self) -> Any:
        return _Resharded if self.sequence_parallel else _CutOrJoined

    @cached_property
    def resharding(self) -> Resharding:
        """With sequence parallelism: from stock's part of the sequence to this rank's share."""
        grid, part = self.groups.grid, self.s // self.groups.grid.size
        stock = [[Region(range(r * part, (r + 1) * part), range(self.b))] for r in range(grid.size)]
        shares = [self.regions(r) for r in range(grid.size)]
        mine = [grid.tp_rank(self.groups.coordinates[0], j) for j in range(grid.n)]
        others = [r for r in range(grid.size) if r not in mine]
        if not any(one.common(two) for r in mine for q in others for one in stock[r] for two in shares[q]):
            return Resharding(self.groups.dim, [stock[r] for r in mine], [shares[r] for r in mine])
        return Resharding(self.groups.tp, stock, shares)


class SampleShare(Share):
    """b/n samples: [s, b, D] <-> [s, b/n, D], with sequence parallelism [s/P, b, D] <-> [s/m, b/n, D]."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.s // self._parts, self.b // self.groups.grid.n

    def cut(self, states: Tensor) -> Tensor:
        # Contiguous also where b/n = 1 would make it look so by itself: pipeline messages must be.
        return states.chunk(self.groups.grid.n, dim=1)[self.groups.coordinates[1]].contiguous()

    def join(self, shares: Tensor) -> Tensor:
        return shares.transpose(0, 1).flatten(1, 2).contiguous()

    def regions(self, tp_rank: int) -> list[Region]:
        i, j = self.groups.grid.coordinates(tp_rank)
        length, samples = self.s // self.groups.grid.m, self.b // self.groups.grid.n
        return [Region(range(i * length, (i + 1) * length), range(j * samples, (j + 1) * samples))]


class TokenShare(Share):
    """An early and a late chunk of every sample: [s, b, D] <-> [s/n, b, D], or [s/P, b, D] <-> [s/n/m, b, D]."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.s // self.groups.grid.n // self._parts, self.b

    def cut(self, states: Tensor) -> Tensor:
        return own_tokens(states, self.groups.coordinates[1], self.groups.grid.n)

    def join(self, shares: Tensor) -> Tensor:
        return in_order(shares)

    def join_last(self, lasts: Tensor) -> Tensor:
        return lasts[0]  # whose late chunk is the last of all

    def regions(self, tp_rank: int) -> list[Region]:
        (i, j), n = self.groups.grid.coordinates(tp_rank), self.groups.grid.n
        size, part = self.s // (2 * n), self.s // self.groups.grid.size
        # The i-th m-th of the early chunk with the late one behind it.
        own = Region(range(i * part, (i + 1) * part), range(self.b))
        found = []
        for place, chunk in enumerate(chunks_of(j, n)):
            held = own.common(Region(range(place * size, (place + 1) * size), own.samples))
            shift = (chunk - place) * size
            found.append(held._replace(positions=range(held.positions.start + shift, held.positions.stop + shift)))
        return [region for region in found if region]


def share_of(groups: HeadDimGroups, s: int, b: int, sequence_parallel: bool) -> Share:
    """This rank's share of a micro-batch.

    Raises:
        ValueError: it cannot be spread over the dim axis.
    """
    n = groups.grid.n
    if b % n == 0:
        return SampleShare(groups, s, b, sequence_parallel)
    if s % (2 * n) == 0:
        return TokenShare(groups, s, b, sequence_parallel)
    raise ValueError(
        f"exchange `weights` needs a micro-batch size divisible by n, or a sequence length divisible by 2n: got {b} "
        f"samples of {s} tokens for n = {n}"
    )


def _gathered(own: Tensor, share: Share) -> Tensor:
    return share.join(_side_by_side(own, share))


def _side_by_side(own: Tensor, share: Share) -> Tensor:
    """What each rank of a dim group has, [n, ..]."""
    n = share.groups.grid.n
    # Laid side by side as gloo demands: [n · len(own), ..]
    shares = own.new_empty((n * own.shape[0], *own.shape[1:]))
    dist.all_gather_into_tensor(shares, own.contiguous(), group=share.groups.dim)
    return shares.unflatten(0, (n, -1))


class _CutOrJoined(torch.autograd.Function):
    """Cutting what all ranks hold, whose gradient is gathered, or gathering it, whose gradient is cut."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, share: Share, cut: bool) -> Tensor:
        ctx.share, ctx.cut = share, cut
        return share.cut(states) if cut else _gathered(states, share)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _gathered(gradient, ctx.share) if ctx.cut else ctx.share.cut(gradient), None, None


class _Resharded(torch.autograd.Function):
    """Every token to the rank that works on it, or back; gradients go the other way."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, share: Share, there: bool) -> Tensor:
        ctx.share, ctx.there = share, there
        return share.resharding.move(states, back=not there)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.share.resharding.move(gradient, back=ctx.there), None, None
