"""What all attention layers on a grid have."""

from __future__ import annotations

from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection

from hp_plugin.config import HeadDimConfig
from hp_plugin.grid.groups import HeadDimGroups


class GridAttention:
    """An attention layer whose heads are split over the head axis of a grid.

    `passing` is what the layer around says of the whole micro-batch, where it may give attention its share of it.
    """

    head_dim: HeadDimConfig
    groups: HeadDimGroups
    passing: Any = None


def groups_of(head_dim: HeadDimConfig, pg_collection: Any) -> HeadDimGroups:
    """The groups that a layer on this grid is built on.

    Raises:
        RuntimeError: no grid is registered, or it is not this one.
    """
    groups = HeadDimGroups.from_collection(pg_collection)
    if groups.grid != head_dim.grid:
        raise RuntimeError(
            f"the model's grid is {head_dim.grid}, the initialized one {groups.grid}: "
            "initialize_head_dim_parallel and the config must name the same"
        )
    return groups


def stock_collection() -> ProcessGroupCollection:
    """The groups that stock attention takes where it is given none."""
    return ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp", "pp"])
