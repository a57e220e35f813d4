"""A grid shard as one piece of the stock global tensor, for `megatron.core.dist_checkpointing`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from hp_plugin.checkpoint.trade import from_stock_part, to_stock_part, together
from hp_plugin.grid.groups import HeadDimGroups
from hp_plugin.grid.ownership import SlicedAxis

_only_described: ContextVar[bool] = ContextVar("_only_described", default=False)


def grid_piece(stock: ShardedTensor, weight_axis: int, axis: SlicedAxis, groups: HeadDimGroups) -> ShardedTensorFactory:
    """What rank (i, j) saves and loads for a weight that the grid shards: as much of it as stock's rank i·n + j.

    The dim group trades slots, so that each rank has a contiguous part of the stock tensor, of the weight's own shape:
    writing one piece takes a fraction of the time of writing one for every slot. Saving builds the part; loading reads
    it into the weight's own memory and trades it back. Both are collective calls over the dim group, whose ranks have
    the same weights in the same order. Optimizers do the same to the tensors they keep for the weight.

    Args:
        stock: the description that stock makes of this shard; its key, replica and prepended layer axes are kept.
        weight_axis: which axis of the weight the grid shards, prepended ones not counted.

    Source: `megatron.core.dist_checkpointing.mapping.ShardedTensorFactory`, which stock uses for gated MLPs.
    """
    prepended, (i, j) = stock.prepend_axis_num, groups.coordinates
    layers = tuple((a, stock.global_offset[a], stock.axis_fragmentations[a]) for a in range(prepended))
    fragment = (prepended + weight_axis, i * axis.n + j, axis.m * axis.n)

    def build(key: str, weight: Tensor, replica_id: Any, flattened_range: slice | None) -> ShardedTensor:
        if flattened_range is not None:
            raise ValueError(
                f"{key}: flattened optimizer state (sharding type fully_sharded_model_space) has no place on a grid "
                "with n > 1: use fully_reshardable (Megatron-LM: --dist-ckpt-optim-fully-reshardable)"
            )
        part = weight if _only_described.get() else to_stock_part(weight, weight_axis, axis, groups.dim)
        return ShardedTensor.from_rank_offsets(
            key, part, *layers, fragment, replica_id=replica_id, prepend_axis_num=prepended
        )

    def merge(part: Tensor) -> Tensor:
        return from_stock_part(part, weight_axis, axis, groups.dim)

    return ShardedTensorFactory(stock.key, stock.data, build, merge, stock.replica_id)


@contextmanager
def only_described() -> Iterator[None]:
    """Within it pieces have the right key, shape and place, and the wrong contents: nothing is traded to build them."""
    token = _only_described.set(True)
    try:
        yield
    finally:
        _only_described.reset(token)


def trade_together() -> Callable[[], None]:
    """Has `dist_checkpointing` trade all weights of a checkpoint at once, and none to load; returns what ends that.

    Upstream builds pieces one by one, to save and to load, and does not say for which. Without this the results are the
    same, with a collective for every weight, twice when loading.
    """
    originals = {name: getattr(serialization, name) for name in _CONTEXTS}

    def within(name: str) -> Callable[..., Any]:
        @wraps(originals[name])
        def call(*args: Any, **kwargs: Any) -> Any:
            with _CONTEXTS[name]():
                return originals[name](*args, **kwargs)

        return call

    for name in _CONTEXTS:
        setattr(serialization, name, within(name))

    def take_away() -> None:
        for name, original in originals.items():
            setattr(serialization, name, original)

    return take_away


_CONTEXTS = {"save_preprocess": together, "load_preprocess": only_described, "apply_factory_merges": together}
"""Functions of `megatron.core.dist_checkpointing.serialization` that build pieces or merge them."""
