"""Keeps a rank's own weights from loading where the grid cuts them otherwise, stock's loaders included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hp_plugin.grid.ownership import SlicedAxis
from hp_plugin.grid.ranks import Grid

BLOCK = "saved_on_head_dim_grid"
"""Beside the weights of a layer: (m, n, i, j) of the grid and the rank that hold them."""


def fence_weights(layer: nn.Module, axes: Mapping[str, tuple[int, SlicedAxis]], grid: Grid, i: int, j: int) -> None:
    """Makes `state_dict` show what the grid shards as two axes, `[slots/m, d/n]`, in the place of the sharded one.

    A rank's weights have the same shape as stock's of the same TP size, and as those of other grids; state dicts of a
    rank alone (`--ckpt-format torch`, DeepSpeed's engine, `torch.save`) would load there without a word. So fenced,
    a layer off this grid ends with the weight's name and both shapes, loading strictly or not, and one of another grid
    or another rank with a ValueError that names both. `load_state_dict` of the layer itself takes its own back, and
    unfenced weights, which come from `dist_checkpointing` or are somebody's own. `sharded_state_dict` is left alone, as
    are grids with n = 1, whose ranks hold what stock's hold.

    Args:
        layer: the module whose parameters are named.
        axes: by parameter name, which axis of it is sharded, and how.
    """
    if grid.n == 1:
        return
    own = (grid.m, grid.n, i, j)

    def show(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        if any(type(state.get(prefix + name)) is nn.Parameter for name in axes):
            return  # parameters, to be described: of a list of layers `sharded_state_dict` takes what this returns
        for name, (axis, sliced) in axes.items():
            weight = state.get(prefix + name)
            # Not what ZeRO-3 or FSDP leave of it.
            if type(weight) is Tensor and weight.shape[axis : axis + 1] == (sliced.local_size,):
                state[prefix + name] = weight.unflatten(axis, (sliced.local_slots, sliced.local_width))
        state[prefix + BLOCK] = torch.tensor(own)

    def take(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        saved = state.pop(prefix + BLOCK, None)
        if saved is not None and tuple(saved.tolist()) != own:
            m, n, *theirs = saved.tolist()
            raise ValueError(
                f"the weights of {prefix.removesuffix('.')} are those of rank {tuple(theirs)} of a grid {m},{n}, and "
                f"this is rank {(i, j)} of {grid.m},{grid.n}: they load only where they were saved"
            )
        for name, (axis, _) in axes.items():
            weight = state.get(prefix + name)
            if saved is not None and weight is not None and weight.dim() == layer.get_parameter(name).dim() + 1:
                state[prefix + name] = weight.flatten(axis, axis + 1)

    layer.register_state_dict_post_hook(show)
    layer.register_load_state_dict_pre_hook(take)
