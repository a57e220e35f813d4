"""One expert: a Megatron MLP in the shape DeepSpeed-MoE calls it, made anew for every expert."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup


class ExpertMLP(MLP):
    """`MLP` (gated or not, biases or not) that adds its output bias itself: DeepSpeed ignores returned biases.

    Args:
        config: the model's configuration.
        group: the expert tensor-parallel group, of one rank if experts are whole.
    """

    def __init__(self, config: TransformerConfig, submodules: MLPSubmodules, group: ProcessGroup) -> None:
        own = copy.copy(config)
        own.ffn_hidden_size = config.moe_ffn_hidden_size
        own.sequence_parallel = False  # the slots of an expert hold whole tokens, gathered already
        super().__init__(own, submodules, is_expert=True, ffn_hidden_size=own.ffn_hidden_size, tp_group=group)
        if group.size() == 1:
            # No parameter has a duplicate on the other TP ranks, so gradient norms must count every one.
            for parameter in self.parameters():
                parameter.tensor_model_parallel = True

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Slots `[…, D]` to the same shape."""
        # Megatron leaves an expert's communication to its own dispatchers: its linears do none.
        slots = copy_to_tensor_model_parallel_region(hidden_states.flatten(0, -2), group=self.tp_group)
        output, bias = super().forward(slots, *args, **kwargs)
        output = reduce_from_tensor_model_parallel_region(output, group=self.tp_group)
        output = output if bias is None else output + bias
        return output.view(hidden_states.shape)


class ExpertMaker(nn.Module):
    """What DeepSpeed copies for every expert: copying it builds a new expert.

    A copied expert would start from the weights of the first, and process groups cannot be copied at all.

    Args:
        build: makes the next expert of this rank.

    Source: `deepspeed.moe.experts.Experts`, which deep-copies the module it is given.
    """

    def __init__(self, build: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.build = build

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        return self.build()


class NumberedExperts:
    """Builds the experts of one rank; with CPU initialization, each from a seed of its global number.

    Megatron-Core promises that CPU initialization gives the same model on every layout. Experts are drawn by some
    ranks only, so they must neither depend on the generator that all ranks share nor advance it.

    Args:
        build: makes one expert.
        first: global number of this rank's first expert.
        by_number: whether weights are to depend on the global number alone.
    """

    def __init__(self, build: Callable[[], nn.Module], first: int, by_number: bool) -> None:
        self._build, self._next = build, first
        self._seed = int(torch.randint(2**31, (), device="cpu")) if by_number else None

    def __call__(self) -> nn.Module:
        number, self._next = self._next, self._next + 1
        if self._seed is None:
            return self._build()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed + number)
            return self._build()
