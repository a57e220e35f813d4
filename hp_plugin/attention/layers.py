"""The two parallel layer types: stock column- and row-parallel linears on a head × dimension grid.

Each is one class body over whatever linear the stock layer spec names (Megatron-Core's own, Transformer Engine's with
or without fused norm, inference ones): `head_dim_layer(HeadDimColumnParallelLinear, base)` is their common subclass.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer.spec_utils import ModuleSpec, get_module
from torch import Tensor

from hp_plugin.checkpoint.pieces import grid_piece
from hp_plugin.exchange.strategy import QKV, Turn
from hp_plugin.grid.groups import HeadDimGroups
from hp_plugin.grid.ownership import SlicedAxis
from hp_plugin.upstream.spec_tree import parts


class _GridShard:
    """A linear over all P ranks whose shard is a block of the grid instead of a contiguous P-th.

    Args:
        groups: the rank's grid. It replaces the TP group that stock attention passes, which is its head group.
        axis: the sharded weight axis; `owned` lists the stock indices of it that this rank holds, in order.
        turn: the slot from which each forward pass takes its exchange.
    """

    shard_dim: int
    sharded_parameters: tuple[str, ...]

    def __init__(
        self,
        *args: Any,
        groups: HeadDimGroups,
        axis: SlicedAxis,
        turn: Turn,
        init_method: Callable[[Tensor], Any],
        tp_group: Any = None,
        **kwargs: Any,
    ) -> None:
        # With CPU initialization stock fills the whole weight and keeps the r-th part of it: permuted this way, that
        # part is the rank's block, so one seed gives one model on every grid and on TP = 1.
        def init_in_owned_order(weight: Tensor) -> None:
            init_method(weight)
            if weight.shape[self.shard_dim] == axis.global_size and groups.grid.size > 1:
                order = torch.tensor(axis.permutation(groups.grid.owners), device=weight.device)
                with torch.no_grad():
                    weight.copy_(weight.index_select(self.shard_dim, order))

        super().__init__(*args, init_method=init_in_owned_order, tp_group=groups.tp, **kwargs)
        self.grid_axis = axis
        self.grid_groups = groups
        self.turn = turn

    @property
    def owned(self) -> list[int]:
        """Stock indices of the sharded axis that this rank holds, in local order."""
        return self.grid_axis.owned(*self.grid_groups.coordinates)

    def sharded_state_dict(self, prefix: str = "", *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Stock's keys and global tensors; what the grid shards is described as this rank's piece of them."""
        described = super().sharded_state_dict(prefix, *args, **kwargs)
        if self.grid_axis.n == 1:
            return described
        for name in self.sharded_parameters:
            if isinstance(described.get(prefix + name), ShardedTensor):
                described[prefix + name] = grid_piece(
                    described[prefix + name], self.shard_dim, self.grid_axis, self.grid_groups
                )
        return described


class HeadDimColumnParallelLinear(_GridShard):
    """Column-parallel linear over all P ranks, then the exchange from dim slices to heads.

    Input `[s, b, D]`, weight rows `[g/m, h/g + 2, d/n]` of the stock `linear_qkv`; output as the exchange gives it
    (`batch`: `[s, b/n, (g/m)(h/g + 2)d]`, what stock `SelfAttention` expects from `linear_qkv` at TP = m).
    """

    shard_dim = 0
    sharded_parameters = ("weight", "bias")

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor | QKV, Tensor | None]:
        mixed, bias = super().forward(*args, **kwargs)
        return self.turn.exchange.to_heads(mixed), bias


class HeadDimRowParallelLinear(_GridShard):
    """The exchange from heads back to dim slices, then the row-parallel linear over all P ranks.

    Input: this rank's attention output (`batch`: `[s, b/n, (h/m)d]`); weight columns `[h/m, d/n]` of the stock
    `linear_proj`; output `[s, b, D]`.
    """

    shard_dim = 1
    sharded_parameters = ("weight",)

    def forward(self, context: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        return super().forward(self.turn.exchange.to_slices(context), *args, **kwargs)


@cache
def head_dim_layer(layer: type, base: type) -> type:
    """The class that is both `layer` (one of the two above) and the stock linear `base`."""
    return type(f"HeadDim{base.__name__}", (layer, base), {"__doc__": layer.__doc__, "__module__": __name__})


def submodule_spec(layer: type, stock: Any, **params: Any) -> Any:
    """A spec that builds `layer` over the class that the stock submodule spec names, with these parameters."""
    if isinstance(stock, partial):  # as releases from 0.18 on name a mixture
        return partial(head_dim_layer(layer, parts(stock)[0]), *stock.args, **stock.keywords, **params)
    base = get_module(stock)
    own = dict(stock.params) if isinstance(stock, ModuleSpec) else {}
    submodules = stock.submodules if isinstance(stock, ModuleSpec) else None
    return ModuleSpec(module=head_dim_layer(layer, base), params=own | params, submodules=submodules)
