"""Parameters that every rank holds whole, of whose gradient the ranks of a dim group have each its own tokens' part."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
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


def take_from_one(module: nn.Module, counts: bool, concerned: Callable[[Tensor], list[str]]) -> None:
    """Takes gradients of a module's own parameters from one of the ranks that all have the same, and sum them later.

    Args:
        counts: whether this rank is the one.
        concerned: says of which parameters, by the states that the module is called with.
    """
    hidden: list[str] = []

    def hide(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        names = concerned(args[0] if args else next(iter(kwargs.values())))
        if torch.is_grad_enabled():
            # An entry of its own hides the parameter of this name.
            vars(module).update({name: _FromOne.apply(getattr(module, name), counts) for name in names})
            hidden.extend(names)

    def show(module: nn.Module, args: Any, output: Any) -> None:
        for name in hidden:
            vars(module).pop(name, None)
        hidden.clear()

    module.register_forward_pre_hook(hide, with_kwargs=True)
    module.register_forward_hook(show, always_call=True)


class _FromOne(torch.autograd.Function):
    """Identity, whose gradient is zero on the ranks that do not count."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, counts: bool) -> Tensor:
        ctx.counts = counts
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient if ctx.counts else torch.zeros_like(gradient), None
