"""Registers the grid's process groups in Megatron-Core's parallel state; the only state of this package."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from hp_plugin.attention.dynamic_batches import refuse_dynamic_batches
from hp_plugin.attention.finalization import finalize_on_grid
from hp_plugin.checkpoint.optimizer_fence import fence_optimizer_state
from hp_plugin.checkpoint.pieces import trade_together
from hp_plugin.config import HeadDimConfig
from hp_plugin.grid.groups import HeadDimGroups
from hp_plugin.grid.ranks import DEFAULT_ORDER, Grid, tensor_parallel_groups

_registered: _Registration | None = None
_listeners: list[Callable[[], None]] = []


def initialize_head_dim_parallel(head_dim: HeadDimConfig | str | Sequence[int], **stock: Any) -> None:
    """`parallel_state.initialize_model_parallel` with TP = m · n, and the head and dim group of every TP group.

    Adds to `megatron.core.parallel_state`, until `destroy_model_parallel`: `get_head_parallel_group`, `..._rank`,
    `..._world_size` and the same for `dim`; and to every `ProcessGroupCollection.use_mpu_process_groups()` the
    attributes `head` and `dim`.

    Args:
        head_dim: the grid, "m,n" or a pair.
        stock: whatever `initialize_model_parallel` takes beside `tensor_model_parallel_size` (given, it must be m · n).

    Raises:
        ValueError: the grid contradicts the TP size, does not divide the world, or differs between ranks.
        TypeError: an argument that this release's `initialize_model_parallel` does not take.
        RuntimeError: torch.distributed is not initialized, or model parallelism already is.
    """
    initialize_on_grid(parallel_state.initialize_model_parallel, head_dim, **stock)


def initialize_on_grid(
    stock_initialize: Callable[..., None], head_dim: HeadDimConfig | str | Sequence[int], **stock: Any
) -> None:
    """`initialize_head_dim_parallel` with the stock initializer as an argument, for whoever replaced it by this."""
    head_dim = HeadDimConfig.of(head_dim)
    if not dist.is_initialized():
        raise RuntimeError("call torch.distributed.init_process_group before initialize_head_dim_parallel")
    if parallel_state.model_parallel_is_initialized():
        grid = "a grid" if _registered else "no grid"
        raise RuntimeError(
            f"model parallelism is already initialized, with {grid}: call "
            "parallel_state.destroy_model_parallel() first, or initialize only once"
        )
    head_dim.check_tensor_parallel_size(stock.pop("tensor_model_parallel_size", None))
    bound = inspect.signature(stock_initialize).bind_partial(**stock).arguments
    for name in ("gtp_remat_size", "expert_gtp_remat_size"):
        if bound.get(name, 1) > 1:
            raise ValueError(f"{name} {bound[name]}: GTP shards weights across the grid's pieces; leave it out")
    pipeline, context = bound.get("pipeline_model_parallel_size", 1), bound.get("context_parallel_size", 1)
    _check_same_on_all_ranks({"head_dim_parallel": head_dim, **stock})
    head_dim.check_world_size(dist.get_world_size(), pipeline, context)
    grid = head_dim.grid
    tp_groups = tensor_parallel_groups(
        dist.get_world_size(), grid.size, pipeline, context, bound.get("order", DEFAULT_ORDER)
    )
    stock_initialize(tensor_model_parallel_size=grid.size, **stock)
    timeout = timedelta(minutes=bound.get("distributed_timeout_minutes", 30))
    register_groups(_new_groups(grid, tp_groups, timeout))


def when_registered(listener: Callable[[], None]) -> None:
    """Calls `listener` whenever a grid is registered, and now if one is."""
    _listeners.append(listener)
    if _registered:
        listener()


def registered_groups() -> HeadDimGroups | None:
    """The grid of this process, or None."""
    return _registered.groups if _registered else None


def register_groups(groups: HeadDimGroups) -> None:
    """Makes a grid that was built elsewhere the one that `megatron.core.parallel_state` knows.

    Raises:
        RuntimeError: one is registered already.
    """
    global _registered
    if _registered:
        raise RuntimeError("a head × dimension grid is already registered: destroy_model_parallel first")
    _registered = _Registration(groups)
    for listener in _listeners:
        listener()


def _new_groups(grid: Grid, tp_groups: list[list[int]], timeout: timedelta) -> HeadDimGroups:
    """Builds the groups of all TP groups on every rank, in one order, as torch demands; keeps this rank's."""
    tp = parallel_state.get_tensor_model_parallel_group()
    own = dist.get_process_group_ranks(tp)
    assert own in tp_groups, f"Megatron-Core's TP group {own} is none of {tp_groups}"
    mine: dict[str, dist.ProcessGroup] = {}
    for axis, split in (("head", grid.head_groups), ("dim", grid.dim_groups)):
        for tp_ranks in tp_groups:
            for ranks in split(tp_ranks):
                group = parallel_state.create_group(ranks, timeout=timeout, group_desc=f"{axis.upper()}_PARALLEL_GROUP")
                if dist.get_rank() in ranks:
                    mine[axis] = group
    return HeadDimGroups(grid, tp, mine["head"], mine["dim"])


def _check_same_on_all_ranks(arguments: dict[str, Any]) -> None:
    """Says which arguments differ between ranks, instead of hanging in a group that some ranks never enter."""
    own = {name: repr(value) for name, value in arguments.items() if not callable(value)}
    everyone: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, own)
    differing = sorted(
        {name for other in everyone for name in own.keys() | other.keys() if other.get(name) != everyone[0].get(name)}
    )
    if differing:
        said = "; ".join(
            f"{name}: " + ", ".join(f"rank {rank}: {other.get(name)}" for rank, other in enumerate(everyone))
            for name in differing
        )
        raise ValueError(f"ranks disagree on how to initialize model parallelism: {said}")


class _Registration:
    """Adds the getters to upstream's modules, and takes them away again with the groups they return."""

    def __init__(self, groups: HeadDimGroups) -> None:
        self.groups = groups
        self._take_away = [
            fence_optimizer_state(groups.grid),
            trade_together(),
            finalize_on_grid(groups),
            refuse_dynamic_batches(groups),
        ]
        self._destroy: Callable[[], None] = parallel_state.destroy_model_parallel
        self._collect = ProcessGroupCollection.__dict__["use_mpu_process_groups"]
        self._getters = {
            **_getters("head", groups.head),
            **_getters("dim", groups.dim),
        }
        for name, getter in self._getters.items():
            setattr(parallel_state, name, getter)
        parallel_state.destroy_model_parallel = self.destroy
        collect = self._collect

        def with_grid(cls: type, *args: Any, **kwargs: Any) -> ProcessGroupCollection:
            collection = collect.__func__(cls, *args, **kwargs)
            collection.head, collection.dim = groups.head, groups.dim
            return collection

        ProcessGroupCollection.use_mpu_process_groups = classmethod(with_grid)

    def destroy(self) -> None:
        """`destroy_model_parallel`, and everything this registration added."""
        global _registered
        for name in self._getters:
            delattr(parallel_state, name)
        parallel_state.destroy_model_parallel = self._destroy
        ProcessGroupCollection.use_mpu_process_groups = self._collect
        for take_away in self._take_away:
            take_away()
        _registered = None
        self._destroy()


def _getters(axis: str, group: dist.ProcessGroup) -> dict[str, Callable[[], Any]]:
    def get_group() -> dist.ProcessGroup:
        return group

    get_group.__doc__ = f"Get the {axis}-parallel group the caller rank belongs to."
    return {
        f"get_{axis}_parallel_group": get_group,
        f"get_{axis}_parallel_rank": group.rank,
        f"get_{axis}_parallel_world_size": group.size,
    }
