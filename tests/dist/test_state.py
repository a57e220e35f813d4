"""Registration in Megatron-Core's parallel state: groups, getters, and the errors before any group is made."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from hp_plugin.attention.registration import initialize_head_dim_parallel, registered_groups
from hp_plugin.config import HeadDimConfig
from hp_plugin.grid.groups import HeadDimGroups
from hp_plugin.grid.ranks import ORDERS, Grid
from tests.ranks import Ranks

GETTERS = [f"get_{axis}_parallel_{what}" for axis in ("head", "dim") for what in ("group", "rank", "world_size")]


def registered(m: int, n: int, order: str, stock: dict[str, Any]) -> dict[str, Any]:
    initialize_head_dim_parallel(HeadDimConfig(m, n, order=order), **stock)
    tp = dist.get_process_group_ranks(parallel_state.get_tensor_model_parallel_group())
    collection = ProcessGroupCollection.use_mpu_process_groups()
    found = {
        "tp": tp,
        "head": dist.get_process_group_ranks(parallel_state.get_head_parallel_group()),
        "dim": dist.get_process_group_ranks(parallel_state.get_dim_parallel_group()),
        "coordinates": (parallel_state.get_head_parallel_rank(), parallel_state.get_dim_parallel_rank()),
        "sizes": (parallel_state.get_head_parallel_world_size(), parallel_state.get_dim_parallel_world_size()),
        "collection": collection.head is parallel_state.get_head_parallel_group()
        and collection.dim is parallel_state.get_dim_parallel_group(),
        "pp": parallel_state.get_pipeline_model_parallel_world_size(),
        "value": HeadDimGroups.from_collection(collection) == registered_groups(),
    }
    parallel_state.destroy_model_parallel()
    assert registered_groups() is None and not any(hasattr(parallel_state, name) for name in GETTERS)
    # A second grid after the first, to see that nothing of the first is left.
    initialize_head_dim_parallel(f"{n},{m}", **stock)
    assert parallel_state.get_head_parallel_world_size() == n
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel()
    assert not hasattr(ProcessGroupCollection.use_mpu_process_groups(), "head")
    parallel_state.destroy_model_parallel()
    return found


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("world", "m", "n", "stock"),
    [
        (4, 2, 2, {}),
        (6, 3, 2, {"order": "tp-cp-ep-pp-dp"}),
        (8, 1, 2, {"pipeline_model_parallel_size": 2, "context_parallel_size": 2}),
        (8, 2, 2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
        (8, 2, 1, {"order": "tp-pp-dp", "pipeline_model_parallel_size": 2, "distributed_timeout_minutes": 3}),
    ],
)
def test_groups_are_the_grids(ranks: Ranks, world: int, m: int, n: int, stock: dict[str, Any], order: str) -> None:
    grid = Grid(m, n, order)
    for rank, found in enumerate(ranks.run(world, registered, m, n, order, stock)):
        i, j = grid.coordinates(found["tp"].index(rank))
        assert found["coordinates"] == (i, j) and found["sizes"] == (m, n)
        assert found["head"] == grid.head_groups(found["tp"])[j]
        assert found["dim"] == grid.dim_groups(found["tp"])[i]
        assert found["collection"] and found["value"]
        assert found["pp"] == stock.get("pipeline_model_parallel_size", 1)


def initialization_error(calls: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> tuple[str, int]:
    """The message of the last call's error, and how many groups exist then."""
    before = len(dist.distributed_c10d._world.pg_map)
    try:
        for args, kwargs in calls:
            initialize_head_dim_parallel(*args, **kwargs)
    except (ValueError, RuntimeError, TypeError) as error:
        made = len(dist.distributed_c10d._world.pg_map) - before
        parallel_state.destroy_model_parallel()
        return str(error), made
    raise AssertionError("no error")


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        (("2,3",), {}, "world size 4 is not a multiple of 6 (head-dim-parallel 2,3)"),
        (("2,2",), {"pipeline_model_parallel_size": 2}, "world size 4 is not a multiple of 8"),
        (("2,2",), {"tensor_model_parallel_size": 2}, "--tensor-model-parallel-size 2 contradicts"),
        (("2x2",), {}, "two integers m,n"),
        (("2,2",), {"no_such_argument": 1}, "no_such_argument"),
    ],
)
def test_bad_input_before_any_group(ranks: Ranks, args: Any, kwargs: Any, message: str) -> None:
    for said, made in ranks.run(4, initialization_error, [(args, kwargs)]):
        assert message in said and made == 0


def test_twice_is_an_error(ranks: Ranks) -> None:
    for said, _ in ranks.run(4, initialization_error, [(("2,2",), {})] * 2):
        assert "already initialized, with a grid" in said


def disagreeing_ranks() -> tuple[str, int]:
    return initialization_error([((HeadDimConfig(2, 2) if dist.get_rank() < 3 else HeadDimConfig(1, 4),), {})])


def test_ranks_that_disagree_say_so_instead_of_hanging(ranks: Ranks) -> None:
    for said, made in ranks.run(4, disagreeing_ranks, timeout=30):
        assert "ranks disagree" in said and "rank 3: HeadDimConfig(m=1, n=4" in said and made == 0


def without_a_grid() -> str:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    try:
        HeadDimGroups.from_collection(None)
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_a_grid_layer_without_a_grid_says_what_to_call(ranks: Ranks) -> None:
    assert all("call hp_plugin.initialize_head_dim_parallel" in said for said in ranks.run(2, without_a_grid))
