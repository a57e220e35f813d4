"""Refuses a model that is not built on the grid its DeepSpeed configuration names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.attention import Attention
from torch import nn

from hp_plugin.attention.on_grid import GridAttention
from hp_plugin.config import HeadDimConfig
from hp_plugin.exchange.rules import RULES
from hp_plugin.grid.groups import HeadDimGroups


def check_model(model: nn.Module, head_dim: HeadDimConfig, groups: HeadDimGroups, settings: Mapping[str, Any]) -> None:
    """Compares every attention layer of a model with the grid.

    Raises:
        ValueError: layers are off the grid or on another one, or the model accumulates or reduces its own gradients.
    """
    for complaint in chain(_complaints(model, head_dim, groups), _zero_complaints(model, settings)):
        raise ValueError(f"head_dim_parallel m={head_dim.m}, n={head_dim.n}: {complaint}")


def grid_layers(model: nn.Module) -> dict[str, GridAttention]:
    """The attention layers on a grid, by their names in the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, GridAttention)}


def _complaints(model: nn.Module, head_dim: HeadDimConfig, groups: HeadDimGroups) -> Iterator[str]:
    for name, module in model.named_modules():
        if isinstance(module, DistributedDataParallel):
            yield (
                f"{name or 'the model'} is wrapped in Megatron's DistributedDataParallel, which reduces gradients "
                "that DeepSpeed reduces: hand over the bare model"
            )
        if getattr(getattr(module, "config", None), "gradient_accumulation_fusion", False):
            yield (
                "gradient_accumulation_fusion adds gradients to Megatron's main_grad, which DeepSpeed never reads: "
                "build the model's TransformerConfig with gradient_accumulation_fusion=False"
            )
    if head_dim.size == 1:
        return
    on_grid = grid_layers(model)
    if not on_grid:
        yield (
            "the model has no attention layer on the grid: build it after the grid is registered, from "
            "hp_plugin.head_dim_spec(...) and a HeadDimTransformerConfig (or pass a function that builds it as `model`)"
        )
    attention = [name for name, module in model.named_modules() if isinstance(module, Attention)]
    off_grid = [name for name in attention if name not in on_grid]
    if off_grid:
        yield f"{len(off_grid)} attention layer(s) are off the grid, the first is {off_grid[0]}: use head_dim_spec"
    expected = [dist.get_process_group_ranks(group) for group in (groups.tp, groups.head, groups.dim)]
    for name, layer in on_grid.items():
        own = layer.groups
        if [dist.get_process_group_ranks(group) for group in (own.tp, own.head, own.dim)] != expected:
            yield (
                f"{name} was built on the grid {own.grid} with other groups of ranks than those "
                "registered now: build the model after the grid"
            )
        if head_dim.exchange in RULES and head_dim.exchange != layer.head_dim.exchange:
            yield (
                f"the configuration asks for exchange {head_dim.exchange!r}, {name} was built with "
                f"{layer.head_dim.exchange!r}: give the model's HeadDimTransformerConfig the same"
            )


def frees_weights(settings: Mapping[str, Any]) -> bool:
    """Whether DeepSpeed takes weights apart between their uses."""
    zero = settings.get("zero_optimization")
    return isinstance(zero, Mapping) and zero.get("stage", 0) == 3


def _zero_complaints(model: nn.Module, settings: Mapping[str, Any]) -> Iterator[str]:
    if not frees_weights(settings):
        return
    for name, layer in grid_layers(model).items():
        if layer.head_dim.always_moves_weights:
            yield (
                f"zero_optimization.stage 3 frees the weights of {name} between their uses, and exchange "
                f"{layer.head_dim.exchange!r} gathers them ahead: set the stage to 0, 1 or 2, or take another exchange"
            )
