"""Gradients of parameters that all ranks hold, from passes in which all ranks of a dim group have all tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hp_plugin.exchange.replicas import is_partial
from hp_plugin.exchange.weights.block import Block


def count_once(module: nn.Module, block: Block) -> None:
    """Takes the gradients of a module's own marked parameters from one rank of the dim axis where activations move.

    They are summed over the dim axis once per step, for the passes in which weights move and each rank has the part of
    its own tokens. Where activations move every rank has all of it.
    """
    names = [name for name, parameter in module.named_parameters(recurse=False) if is_partial(parameter)]
    if not names or not block.choice.free:
        return
    counts = block.groups.coordinates[1] == 0

    def partial() -> list[str]:
        return [name for name in names if is_partial(getattr(module, name))]

    def hide(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        states = args[0] if args else next(iter(kwargs.values()))
        if block.pass_of(states, module.training).share is None and torch.is_grad_enabled():
            # An entry of its own hides the parameter of this name.
            vars(module).update({name: _FromOne.apply(getattr(module, name), counts) for name in partial()})

    def show(module: nn.Module, args: Any, output: Any) -> None:
        for name in names:
            vars(module).pop(name, None)

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
