"""The process groups of one rank's grid, as one value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from torch.distributed import ProcessGroup

from hp_plugin.grid.ranks import Grid


@dataclass(frozen=True)
class HeadDimGroups:
    """The TP group of P = m · n ranks, and this rank's head group (m ranks) and dim group (n ranks) in it."""

    grid: Grid
    tp: ProcessGroup
    head: ProcessGroup
    dim: ProcessGroup

    def __post_init__(self) -> None:
        sizes = (self.head.size(), self.dim.size(), self.tp.size())
        assert sizes == (self.grid.m, self.grid.n, self.grid.size), f"groups of {sizes} on {self.grid}"
        assert (self.head.rank(), self.dim.rank()) == self.coordinates, "groups disagree with the grid's order"

    @property
    def coordinates(self) -> tuple[int, int]:
        """(i, j) of this rank: its head group and its dim slice."""
        return self.grid.coordinates(self.tp.rank())

    @classmethod
    def from_collection(cls, pg_collection: Any | None) -> HeadDimGroups:
        """The groups that a Megatron-Core `ProcessGroupCollection` carries (`tp`, `head`, `dim`).

        A collection without `head` and `dim`, or none at all, stands for the groups registered in
        `megatron.core.parallel_state`.

        Raises:
            RuntimeError: no grid is registered, or the collection's TP group is not the registered one.
            ValueError: the collection's groups are not those of a grid.
        """
        head, dim = getattr(pg_collection, "head", None), getattr(pg_collection, "dim", None)
        if head is not None and dim is not None:
            assert pg_collection is not None
            return cls(_grid(pg_collection.tp, head, dim), pg_collection.tp, head, dim)
        registered = getattr(parallel_state, "get_head_parallel_group", None)
        if registered is None:
            raise RuntimeError(
                "no head × dimension grid is registered: call "
                "hp_plugin.initialize_head_dim_parallel(HeadDimConfig(m, n)) in place of "
                "parallel_state.initialize_model_parallel, or pass a ProcessGroupCollection with head and dim groups"
            )
        tp = parallel_state.get_tensor_model_parallel_group()
        given = getattr(pg_collection, "tp", tp)
        if given is not tp:
            raise RuntimeError(
                f"the process-group collection has a TP group of {given.size()} ranks that is not the registered "
                "one, and no head and dim groups of its own: set its `head` and `dim` attributes"
            )
        head, dim = registered(), parallel_state.get_dim_parallel_group()
        return cls(_grid(tp, head, dim), tp, head, dim)


def _grid(tp: ProcessGroup, head: ProcessGroup, dim: ProcessGroup) -> Grid:
    return Grid.found(*(dist.get_process_group_ranks(group) for group in (tp, head, dim)))
