"""Where a rank stands on the m × n grid, and who shares its row and its column; no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from hp_plugin.refusal import shown

DEFAULT_ORDER = "tp-cp-ep-dp-pp"
"""Megatron-Core's order of the parallel dimensions over the world's ranks, `tp` being the innermost."""

DIM_INNERMOST, HEAD_INNERMOST = "dim-innermost", "head-innermost"
ORDERS = (DIM_INNERMOST, HEAD_INNERMOST)
"""Which axis of the grid has neighbouring TP ranks."""
_TOO_MANY = 10**9


@dataclass(frozen=True)
class Grid:
    """The m × n arrangement of one tensor-parallel group: which TP rank r has coordinates (i, j).

    Args:
        order: `dim-innermost`, r = i·n + j, or `head-innermost`, r = j·m + i. Where an axis has one rank the two are
            one, and the grid is the dim-innermost one.

    Raises:
        ValueError: m or n is not a positive integer, or the order does not exist.
    """

    m: int
    n: int
    order: str = DIM_INNERMOST

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"unknown head-dim-order {shown(self.order)}: choose from {', '.join(ORDERS)}")
        for name, size in (("m", self.m), ("n", self.n)):
            if isinstance(size, bool) or not isinstance(size, int):
                raise ValueError(f"head-dim-parallel {name} must be an integer, got {shown(size)}")
            if not 1 <= size < _TOO_MANY:
                bound = "at least 1" if size < 1 else "a number of ranks"
                raise ValueError(f"head-dim-parallel {name} must be {bound}, got {shown(size)}")
        if 1 in (self.m, self.n):
            object.__setattr__(self, "order", DIM_INNERMOST)

    def __str__(self) -> str:
        return f"{self.m},{self.n}" + (f" {self.order}" if self.order != DIM_INNERMOST else "")

    @classmethod
    def found(cls, tp_group: list[int], head_group: list[int], dim_group: list[int]) -> Grid:
        """The grid over a TP group of world ranks of which these are a head group and a dim group.

        Raises:
            ValueError: there is none.
        """
        for order in ORDERS:
            grid = cls(len(head_group), len(dim_group), order)
            if grid.size != len(tp_group):
                break
            if head_group in grid.head_groups(tp_group) and dim_group in grid.dim_groups(tp_group):
                return grid
        raise ValueError(
            f"ranks {head_group} and {dim_group} are no head group and dim group of a grid over the TP group {tp_group}"
        )

    @property
    def size(self) -> int:
        """P = m · n."""
        return self.m * self.n

    def coordinates(self, tp_rank: int) -> tuple[int, int]:
        """(i, j) of a TP rank: it owns head group i and dim slice j."""
        if not 0 <= tp_rank < self.size:
            raise ValueError(f"TP rank {tp_rank} is not on the {self.m} × {self.n} grid of {self.size} ranks")
        if self.order == DIM_INNERMOST:
            return divmod(tp_rank, self.n)
        j, i = divmod(tp_rank, self.m)
        return i, j

    @property
    def owners(self) -> list[tuple[int, int]]:
        """(i, j) of every TP rank, in their order."""
        return [self.coordinates(tp_rank) for tp_rank in range(self.size)]

    def tp_rank(self, i: int, j: int) -> int:
        """The TP rank at coordinates (i, j)."""
        if not (0 <= i < self.m and 0 <= j < self.n):
            raise ValueError(f"({i}, {j}) is not on the {self.m} × {self.n} grid")
        return i * self.n + j if self.order == DIM_INNERMOST else j * self.m + i

    def head_groups(self, tp_group: list[int]) -> list[list[int]]:
        """The n head groups of one TP group of world ranks: m ranks each, with the same slice j."""
        self._check_group(tp_group)
        return [[tp_group[self.tp_rank(i, j)] for i in range(self.m)] for j in range(self.n)]

    def dim_groups(self, tp_group: list[int]) -> list[list[int]]:
        """The m dim groups of one TP group of world ranks: n ranks each, with the same heads i."""
        self._check_group(tp_group)
        return [[tp_group[self.tp_rank(i, j)] for j in range(self.n)] for i in range(self.m)]

    def _check_group(self, tp_group: list[int]) -> None:
        if len(tp_group) != self.size:
            raise ValueError(
                f"a TP group of {len(tp_group)} ranks does not fill a {self.m} × {self.n} grid of {self.size}"
            )


def tensor_parallel_groups(
    world_size: int, tp: int, pp: int = 1, cp: int = 1, order: str = DEFAULT_ORDER
) -> list[list[int]]:
    """World ranks of every TP group, for any Megatron rank order.

    The first axis named in `order` varies fastest; `ep` is part of `dp` here, as for Megatron-Core's dense groups
    (`megatron.core.parallel_state.RankGenerator`), and axes that `order` leaves out must have size 1.

    Raises:
        ValueError: the sizes do not divide the world, or `order` misses an axis or names an unknown one.
    """
    if world_size % (tp * pp * cp):
        raise ValueError(f"world size {world_size} is not a multiple of TP {tp} × PP {pp} × CP {cp}")
    sizes = {"tp": tp, "cp": cp, "ep": 1, "dp": world_size // (tp * pp * cp), "pp": pp}
    axes = order.lower().split("-")
    unknown = [axis for axis in axes if axis not in sizes]
    missing = [axis for axis, size in sizes.items() if size > 1 and axis not in axes]
    if unknown or missing or len(set(axes)) != len(axes):
        raise ValueError(
            f"rank order {order!r} must name each of tp, cp, dp, pp of a size above 1 once "
            f"(unknown: {unknown}, missing: {missing})"
        )
    strides = {axis: prod(sizes[before] for before in axes[:k]) for k, axis in enumerate(axes)}
    others = [axis for axis in axes if axis != "tp"]
    return [
        [base + k * strides.get("tp", 1) for k in range(tp)]
        for base in sorted(_offsets([(sizes[axis], strides[axis]) for axis in others]))
    ]


def _offsets(axes: list[tuple[int, int]]) -> Iterator[int]:
    if not axes:
        yield 0
        return
    (size, stride), *rest = axes
    for offset in _offsets(rest):
        yield from (k * stride + offset for k in range(size))
