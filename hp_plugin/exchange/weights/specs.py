"""Layer specs on the grid, with whole layers that gather their weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any

from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec, get_module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, _get_block_submodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from hp_plugin.exchange.weights.block import BlockMaker
from hp_plugin.exchange.weights.layers import (
    GatheringColumnLinear,
    GatheringLinear,
    GatheringRowLinear,
    OnWholeTokens,
    WeightsTransformerLayer,
)
from hp_plugin.upstream.spec_tree import parts


def gathering_spec(
    spec: Any, config: TransformerConfig, vp_stage: int | None, mixed_in: Callable[..., ModuleSpec]
) -> Any:
    """A layer, block or multi-token-prediction spec whose layers gather.

    A layer spec becomes the block spec of this (virtual) pipeline stage, since a block's first and last layer differ.
    """
    if _is_layer(spec):
        spec = _get_block_submodules(config, spec, vp_stage)
    return _Swap(config, mixed_in).in_blocks(spec)


def can_gather(spec: Any) -> bool:
    """Whether a spec tree has layers, and all linears that they would gather for are Megatron-Core's own."""
    layers = list(_layers(spec))
    return bool(layers) and all(map(GatheringLinear.can_be, _linears(layers)))


def _layers(spec: Any) -> Iterator[ModuleSpec]:
    if _is_layer(spec):
        yield spec
    elif isinstance(spec, (list, tuple)):
        for one in spec:
            yield from _layers(one)
    elif is_dataclass(spec) and not isinstance(spec, type):
        names = ["submodules"] if isinstance(spec, ModuleSpec) else [field.name for field in fields(spec)]
        for name in names:
            yield from _layers(getattr(spec, name))


def _linears(layers: list[ModuleSpec]) -> Iterator[type]:
    """The classes of the linears that gather."""
    for layer in layers:
        _, attention = parts(layer.submodules.self_attention)
        given = {name: linear for name, linear in vars(attention).items() if name.startswith("linear_")}
        yield from (parts(linear)[0] for linear in given.values() if linear is not None)
        mlp, linears = parts(layer.submodules.mlp)
        if issubclass(mlp, MLP):
            yield from (parts(getattr(linears, name))[0] for name in ("linear_fc1", "linear_fc2"))


@dataclass(frozen=True)
class _Swap:
    config: TransformerConfig
    mixed_in: Callable[..., ModuleSpec]

    def in_blocks(self, spec: Any) -> Any:
        """A copy of a spec tree: the layers of a block spec are one block, any other layer is one of its own."""
        if isinstance(spec, TransformerBlockSubmodules):
            blocks, last = BlockMaker(), len(spec.layer_specs) - 1
            layers = [
                self._layer(layer, blocks, first=number == 0, last=number == last)
                for number, layer in enumerate(spec.layer_specs)
            ]
            return replace(spec, layer_specs=layers)
        if _is_layer(spec):
            return self._layer(spec, BlockMaker(), first=True, last=True)
        if isinstance(spec, (list, tuple)):
            return type(spec)(map(self.in_blocks, spec))
        if isinstance(spec, type) or not is_dataclass(spec):
            return spec
        names = ["submodules"] if isinstance(spec, ModuleSpec) else [field.name for field in fields(spec)]
        result = copy.copy(spec)
        for name in names:
            setattr(result, name, self.in_blocks(getattr(spec, name)))
        return result

    def _layer(self, layer: ModuleSpec, blocks: BlockMaker, **ends: bool) -> ModuleSpec:
        """A layer that knows its block, and, where its MLP is a dense one, an MLP that gathers.

        Megatron's mixture needs nothing: with sequence parallelism, on which it insists, its P ranks have different
        tokens in stock too. Anything else works as in stock, on what stock's ranks hold.
        """
        submodules = layer.submodules
        mlp, linears = parts(submodules.mlp)
        if issubclass(mlp, MLP):
            # Gate and up are stacked in one weight, each sharded by itself.
            runs = 2 if self.config.gated_linear_unit else 1
            gathering = replace(
                linears,
                linear_fc1=self.mixed_in(GatheringColumnLinear, linears.linear_fc1, runs=runs),
                linear_fc2=self.mixed_in(GatheringRowLinear, linears.linear_fc2, runs=1),
            )
            submodules = replace(submodules, mlp=_with_submodules(submodules.mlp, gathering))
        elif not issubclass(mlp, (MoELayer, IdentityOp)):
            submodules = replace(submodules, mlp=self.mixed_in(OnWholeTokens, submodules.mlp))
        whole = self.mixed_in(WeightsTransformerLayer, layer, blocks=blocks, **ends)
        return replace(whole, submodules=submodules)


def _with_submodules(spec: Any, submodules: Any) -> Any:
    if isinstance(spec, partial):
        return partial(spec.func, *spec.args, **{**spec.keywords, "submodules": submodules})
    return replace(spec, submodules=submodules)


def _is_layer(spec: Any) -> bool:
    return isinstance(spec, ModuleSpec) and issubclass(get_module(spec), TransformerLayer)
