"""A grid shard as pieces of the stock global tensor, for `megatron.core.dist_checkpointing`."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from hp_plugin.grid.ownership import SlicedAxis


def grid_pieces(stock: ShardedTensor, weight_axis: int, axis: SlicedAxis, i: int, j: int) -> ShardedTensorFactory:
    """What rank (i, j) holds of a weight, under the stock key and with the stock global shape.

    Locally the weight's axis is `[slots/m, d/n]`, one run of d/n channels for every slot. Each run is one piece of the
    stock tensor, cut evenly into `slots · n` along that axis; loading puts the runs together again. Optimizers apply
    the same cut to the tensors they keep for the weight.

    Args:
        stock: the description that stock makes of this shard; its key, replica and prepended layer axes are kept.
        weight_axis: which axis of the weight the grid shards, prepended ones not counted.

    Source: `megatron.core.dist_checkpointing.mapping.ShardedTensorFactory`, which stock uses for gated MLPs.
    """
    prepended = stock.prepend_axis_num
    layers = tuple((a, stock.global_offset[a], stock.axis_fragmentations[a]) for a in range(prepended))
    pieces, first = axis.slots * axis.n, i * axis.local_slots

    def build(key: str, weight: Tensor, replica_id: Any, flattened_range: slice | None) -> list[ShardedTensor]:
        if flattened_range is not None:
            raise ValueError(
                f"{key}: flattened optimizer state (sharding type fully_sharded_model_space) has no place on a grid "
                "with n > 1: use fully_reshardable (Megatron-LM: --dist-ckpt-optim-fully-reshardable)"
            )
        return [
            ShardedTensor.from_rank_offsets(
                key,
                run,
                *layers,
                (prepended + weight_axis, (first + slot) * axis.n + j, pieces),
                replica_id=replica_id,
                prepend_axis_num=prepended,
            )
            for slot, run in enumerate(weight.split(axis.local_width, weight_axis))
        ]

    def merge(runs: list[Tensor]) -> Tensor:
        return torch.cat(runs, weight_axis)

    return ShardedTensorFactory(stock.key, stock.data, build, merge, stock.replica_id)
