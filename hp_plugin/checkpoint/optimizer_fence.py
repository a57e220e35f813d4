"""Keeps optimizer state that is a rank's own bytes from loading where the grid cuts weights otherwise."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from hp_plugin.grid.ranks import DIM_INNERMOST, Grid


def fence_optimizer_state(grid: Grid) -> Callable[[], None]:
    """Gives the state a key of this grid where Megatron's distributed optimizer names it by the rank's number alone.

    Its sharding types `dp_reshardable` and `dp_zero_gather_scatter` save whole buffers of a rank. They have the same
    size on every grid of a TP size, in either order of its ranks, and on stock, and would load there without a word;
    under the grid's own key such a load, by stock too, ends with a missing key. `fully_reshardable` names tensors and
    is left alone, as is everything on grids with n = 1, whose ranks hold what stock's hold. Returns what takes the
    fence away.
    """
    original = DistributedOptimizer.sharded_state_dict
    if grid.n == 1:
        return lambda: None

    @wraps(original)
    def sharded_state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
        number = self.data_parallel_group_idx
        # Upstream puts this attribute into keys and uses it for nothing else.
        order = "" if grid.order == DIM_INNERMOST else f"-{grid.order}"
        self.data_parallel_group_idx = f"{number}_of_grid_{grid.m}x{grid.n}{order}"
        try:
            return original(self, *args, **kwargs)
        finally:
            self.data_parallel_group_idx = number

    DistributedOptimizer.sharded_state_dict = sharded_state_dict

    def take_away() -> None:
        DistributedOptimizer.sharded_state_dict = original

    return take_away
