"""QK-norm of head slices: the statistics of whole heads, summed over the dim axis."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hp_plugin.exchange.scores.collectives import all_reduce_sum


def norm_kind(norm: nn.Module) -> str | None:
    """`LayerNorm`, `RMSNorm` or `L2Norm` for a norm module of torch, Apex, Transformer Engine or Megatron-Core.

    Returns None for a module that is none of them.
    """
    for base in type(norm).__mro__:
        for kind in ("RMSNorm", "LayerNorm", "L2Norm"):
            if base.__name__.endswith(kind):
                return kind
    return None


def normed_slices(norm: nn.Module, slices: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Applies a norm over whole heads to the slices `[s, b, heads, d/n]` of this rank.

    The weight stays the stock one over d channels; this rank uses, and has gradients for, its slice of it. Statistics
    are fp32, one all-reduce of s · b · heads values each (two for LayerNorm, one for RMSNorm and L2Norm).
    """
    kind = norm_kind(norm)
    assert kind is not None, f"no norm over slices for {type(norm).__name__}"
    width = slices.shape[-1]
    channels = width * group.size()
    values = slices.float()
    if kind == "LayerNorm":
        values = values - all_reduce_sum(values.sum(dim=-1, keepdim=True), group) / channels
    squares = all_reduce_sum(values.square().sum(dim=-1, keepdim=True), group) / channels
    normed = values * torch.rsqrt(squares + _epsilon(norm, slices.dtype))
    own = slice(group.rank() * width, (group.rank() + 1) * width)
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if weight is not None:
        gain = weight[own].float()
        normed = normed * (gain + 1.0 if getattr(norm, "zero_centered_gamma", False) else gain)
    if bias is not None:
        normed = normed + bias[own].float()
    return normed.to(slices.dtype)


def _epsilon(norm: nn.Module, dtype: torch.dtype) -> float:
    epsilon = getattr(norm, "eps", None)
    return torch.finfo(dtype).eps if epsilon is None else float(epsilon)  # torch.nn.RMSNorm's own default
