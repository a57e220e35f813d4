"""Which rows and columns of a stock attention weight a rank of the grid owns; no torch.

The only place that knows the layout: initialization and checkpoints both read it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product


@dataclass(frozen=True)
class SlicedAxis:
    """A weight axis made of `slots` heads of `width` channels, stock layout `[slots, width]`.

    Rank (i, j) of an m × n grid owns slots `[i · slots/m, (i+1) · slots/m)` and of each of them channels
    `[j · width/n, (j+1) · width/n)`, stored in that order: locally `[slots/m, width/n]`.

    Raises:
        ValueError: m does not divide the slots or n the width.
    """

    slots: int
    width: int
    m: int
    n: int

    def __post_init__(self) -> None:
        if self.slots % self.m or self.width % self.n:
            raise ValueError(
                f"{self.slots} slots of {self.width} channels do not divide over a {self.m} × {self.n} grid"
            )

    @property
    def local_slots(self) -> int:
        """Slots one rank holds."""
        return self.slots // self.m

    @property
    def local_width(self) -> int:
        """Channels of each slot one rank holds."""
        return self.width // self.n

    @property
    def global_size(self) -> int:
        """Length of the stock axis."""
        return self.slots * self.width

    @property
    def local_size(self) -> int:
        """Length of the axis on one rank, the stock local length for TP = m · n."""
        return self.local_slots * self.local_width

    def runs(self, i: int, j: int) -> list[range]:
        """The contiguous runs of stock indices that rank (i, j) owns, one per slot, in local order."""
        starts = (
            slot * self.width + j * self.local_width for slot in range(i * self.local_slots, (i + 1) * self.local_slots)
        )
        return [range(start, start + self.local_width) for start in starts]

    def owned(self, i: int, j: int) -> list[int]:
        """The stock indices that rank (i, j) owns, in local order."""
        return [index for run in self.runs(i, j) for index in run]

    def shared_runs(self, j: int, k: int) -> tuple[range, range]:
        """The runs of slice j that lie in the k-th of n equal stock parts of a head group, the same for every group.

        A head group's runs, slot by slot and slice by slice, are the stock order of its channels, so that `slots/m` of
        them in a row are a contiguous n-th of it: what a rank of stock tensor parallelism holds.

        Returns:
            their slots in slice j, local numbers in a row; and their places among the runs of part k, n apart.
        """
        first, last = (-((j - part * self.local_slots) // self.n) for part in (k, k + 1))  # rounded up
        start = first * self.n + j - k * self.local_slots
        return range(first, last), range(start, start + (last - first) * self.n, self.n)

    def permutation(self, owners: Iterable[tuple[int, int]] | None = None) -> list[int]:
        """Stock indices in the order in which TP ranks 0 … m·n-1 own them; split evenly, it gives each rank its own.

        Args:
            owners: (i, j) of every TP rank (`Grid.owners`); by default r = i·n + j.
        """
        owners = product(range(self.m), range(self.n)) if owners is None else owners
        return [index for i, j in owners for index in self.owned(i, j)]


def slots_per_group(h: int, g: int, gate: bool = False) -> int:
    """Head slots of one query group in the fused QKV weight: its h/g queries (twice with gates), k and v."""
    return h // g * (2 if gate else 1) + 2


def qkv_rows(h: int, g: int, d: int, m: int, n: int, gate: bool = False) -> SlicedAxis:
    """Rows of stock `linear_qkv.weight` `[g, h/g + 2, d]` × D (Megatron-Core `SelfAttention`)."""
    if g % m:
        raise ValueError(f"{g} query groups do not divide over m = {m} head groups")
    return SlicedAxis(g * slots_per_group(h, g, gate), d, m, n)


def proj_columns(h: int, d: int, m: int, n: int) -> SlicedAxis:
    """Columns of stock `linear_proj.weight`, D × `[h, d]` (Megatron-Core `SelfAttention`)."""
    return SlicedAxis(h, d, m, n)
