"""Keys and values of all tokens, from the ranks of a dim group that have an early and a late chunk each."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hp_plugin.exchange.sequence.chunks import in_order, spread


def gather_tokens(own: Tensor, dim: dist.ProcessGroup) -> Tensor:
    """[s/n, ..] of every rank of a dim group -> [s, ..] in the order of the sequence; gradients are summed and cut.

    Receives (n-1)/n of the result, and sends as much of its gradient.
    """
    return _GatherTokens.apply(own, dim)


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, dim: dist.ProcessGroup) -> Tensor:
        ctx.dim = dim
        # Laid side by side as gloo demands: [n · s/n, ..]
        parts = own.new_empty((dim.size() * own.shape[0], *own.shape[1:]))
        dist.all_gather_into_tensor(parts, own.contiguous(), group=dim)
        return in_order(parts.unflatten(0, (dim.size(), -1)))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        parts = spread(gradient, ctx.dim.size())
        if dist.get_backend(ctx.dim) == "gloo":
            # Gloo makes an all-reduce of a reduce-scatter, which sends twice as much.
            received = torch.empty_like(parts)
            dist.all_to_all_single(received.flatten(0, 1), parts.flatten(0, 1), group=ctx.dim)
            return received.sum(dim=0), None
        own = torch.empty_like(parts[0])
        dist.reduce_scatter_tensor(own, parts.flatten(0, 1), group=ctx.dim)
        return own, None
