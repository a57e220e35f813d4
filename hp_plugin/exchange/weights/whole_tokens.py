"""Gradients of parameters that all ranks hold, from passes in which all ranks of a dim group have all tokens."""

from __future__ import annotations

from torch import Tensor, nn

from hp_plugin.exchange.replicas import is_partial, take_from_one
from hp_plugin.exchange.weights.block import Block


def count_once(module: nn.Module, block: Block) -> None:
    """Takes the gradients of a module's own marked parameters from one rank of the dim axis where activations move.

    They are summed over the dim axis once per step, for the passes in which weights move and each rank has the part of
    its own tokens. Where activations move every rank has all of it.
    """
    names = [name for name, parameter in module.named_parameters(recurse=False) if is_partial(parameter)]
    if not names or not block.choice.free:
        return

    def concerned(states: Tensor) -> list[str]:
        # Not even looked at where nothing ever is partial: who frees parameters would bring them back for it.
        if not block.choice.can_gather or block.gathers(states, module.training):
            return []
        return names

    take_from_one(module, block.groups.coordinates[1] == 0, concerned)
