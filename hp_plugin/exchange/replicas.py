"""Parameters that every rank holds whole, of whose gradient the ranks of a dim group have each its own tokens' part."""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist
from torch import nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

_MARK = "partial_over_dim"


def mark_partial(parameter: nn.Parameter, partial: bool = True) -> None:
    """Its gradient is to be summed over the dim axis once per step, or no longer is."""
    setattr(parameter, _MARK, partial)


def is_partial(parameter: nn.Parameter) -> bool:
    """Whether it is marked."""
    return getattr(parameter, _MARK, False)


def sum_partial_gradients(parameters: Iterable[nn.Parameter], dim: dist.ProcessGroup) -> None:
    """Sums the gradients of the marked among these parameters in one all-reduce over the dim axis."""
    marked = [parameter for parameter in parameters if parameter.requires_grad and is_partial(parameter)]
    gradients = [getattr(parameter, "main_grad", parameter.grad) for parameter in marked]
    gradients = [gradient.data for gradient in gradients if gradient is not None]
    if not gradients:
        return
    # All of one dtype: that of Megatron's gradient buffers, or the model's.
    flat = _flatten_dense_tensors(gradients)
    dist.all_reduce(flat, group=dim)
    for gradient, summed in zip(gradients, _unflatten_dense_tensors(flat, gradients), strict=True):
        gradient.copy_(summed)
