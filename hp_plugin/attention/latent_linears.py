"""The linears of multi-latent attention (MLA) on a grid: every rank holds stock's TP = P shard of each."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor


class _OverAllRanks:
    """A linear whose shard is a contiguous P-th, whatever group stock's attention runs on."""

    def __init__(self, *args: Any, groups: Any, tp_group: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, tp_group=groups.tp, **kwargs)


class LatentColumnLinear(_OverAllRanks):
    """Column-parallel: from tokens or latents to heads."""

    shard_dim = 0


class LatentRowLinear(_OverAllRanks):
    """Row-parallel: from heads to tokens."""

    shard_dim = 1


class LatentDownLinear(LatentColumnLinear):
    """Column-parallel, from tokens to latents that all heads share; returns all channels of this rank's own tokens.

    Stock gathers them itself, over the TP group that is registered, which is not the one that it runs on here.

    Args:
        shared: the last channels, which each rank of a head group uses for its own heads without a linear in between.
    """

    def __init__(self, *args: Any, shared: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._shared = shared

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        part, bias = super().forward(*args, **kwargs)
        head = self.tp_group
        if head.size() == 1:
            return part, bias
        # [s, b, channels/m] -> [s, b, channels]
        latents = gather_from_tensor_model_parallel_region(part, group=head)
        if self.sequence_parallel:
            return scatter_to_sequence_parallel_region(latents, group=head), bias
        return _UsedByHeads.apply(latents, self._shared, head) if self._shared else latents, bias


class _UsedByHeads(torch.autograd.Function):
    """Identity, where every rank of a head group has the gradient of the last channels from its own heads alone.

    Stock's mapping to that end, `copy_to_tensor_model_parallel_region`, all-reduces a copy of a gradient that is not
    contiguous, and drops it; this one never is.
    """

    @staticmethod
    def forward(ctx: Any, latents: Tensor, shared: int, head: dist.ProcessGroup) -> Tensor:
        ctx.shared, ctx.head = shared, head
        return latents.view_as(latents)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        own, shared = gradient.split([gradient.shape[-1] - ctx.shared, ctx.shared], dim=-1)
        total = shared.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.head)
        return torch.cat((own, total), dim=-1), None, None


class TakenForColumnParallel(ModuleSpec):
    """A spec that stock takes for its column-parallel linear: it asks, by equality, whether it knows the linear."""

    def __eq__(self, other: object) -> bool:
        return other is ColumnParallelLinear

    __hash__ = None  # type: ignore[assignment]
