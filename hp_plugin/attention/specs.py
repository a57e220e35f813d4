"""Takes stock layer specs and returns them with the grid's attention, and norms that know sequence parallelism."""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec, get_module
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
    _get_block_submodules,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import BaseTransformerLayer

from hp_plugin.attention.experts import MARKED_EXPERTS
from hp_plugin.attention.fused_core import with_fused_core
from hp_plugin.attention.latent_attention import HeadDimLatentAttention
from hp_plugin.attention.latent_limits import LATENT_LINEARS
from hp_plugin.attention.layers import submodule_spec
from hp_plugin.attention.recompute import OWN_BIAS, recomputes_mlp
from hp_plugin.attention.self_attention import HeadDimSelfAttention
from hp_plugin.exchange.rules import candidates
from hp_plugin.exchange.strategies import STRATEGIES
from hp_plugin.exchange.strategy import Exchange
from hp_plugin.upstream.spec_tree import Replacement, with_replacements


class SequenceParallelTorchNorm:
    """Megatron-Core's `WrappedTorchNorm` where sequence parallelism is on, which it refuses.

    Builds the plain torch norm with the switch off and marks its parameters `sequence_parallel`, so that Megatron's
    gradient finalization sums them over the TP group, as it does for Apex and Transformer Engine norms.
    """

    def __new__(cls, config: TransformerConfig, *args: Any, **kwargs: Any) -> torch.nn.Module:
        plain = copy.copy(config)
        plain.sequence_parallel = False
        norm = WrappedTorchNorm(plain, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = True
        return norm


def head_dim_spec(
    layer_spec: ModuleSpec | TransformerBlockSubmodules,
    config: TransformerConfig,
    vp_stage: int | None = None,
) -> ModuleSpec | TransformerBlockSubmodules:
    """Any stock GPT layer or block spec with `HeadDimSelfAttention` for `SelfAttention`, fitting norms and experts.

    Raises:
        ValueError: the spec has no `SelfAttention` or `MLASelfAttention` to replace, or layers that nothing can run.
    """
    strategies = _strategies(config, layer_spec)
    names = {"exchanges": tuple(exchange.rule.name for exchange in strategies)} if strategies else {}
    kinds = {
        SelfAttention: Replacement(HeadDimSelfAttention, names),
        MLASelfAttention: Replacement(HeadDimLatentAttention),
    }
    swapped = with_replacements(layer_spec, kinds)
    if swapped is layer_spec:
        raise ValueError(
            f"the layer spec {layer_spec!r} has no megatron.core SelfAttention that the grid could replace"
        )
    swapped = sequence_parallel_norms(mended_mlps(with_fused_core(swapped, config), config), config, vp_stage)
    for exchange in strategies:
        swapped = exchange.whole_layers(swapped, config, vp_stage, submodule_spec)
    return swapped


def finish_model(model: GPTModel) -> None:
    """What exchanges change around the layers of a model that was built from specs on the grid.

    The model computes the same without it; it may move more.
    """
    for exchange in _strategies(model.config):
        exchange.whole_model(model)


def keep_weights(model: torch.nn.Module) -> None:
    """Has activations move in every pass of a model that leaves it open: what it runs in cannot have weights gathered.

    Raises:
        ValueError: its exchange leaves no choice.
    """
    for exchange in STRATEGIES.values():
        if exchange.rule.moves_weights:
            exchange.rule_out(model)


def _strategies(config: TransformerConfig, spec: Any = None) -> list[type[Exchange]]:
    """What may run: what is asked for, or, of what is left open, what can take layers of this spec."""
    head_dim = getattr(config, "head_dim_parallel", None)
    if head_dim is None:  # a spec can be made before its grid is known; the layers ask for it
        return []
    found = [STRATEGIES[name] for name in candidates(head_dim.exchange, head_dim.n)]
    if not head_dim.chooses or spec is None:
        return found
    able = [exchange for exchange in found if exchange.can_take(spec, config)]
    if not able:
        raise ValueError(f"{LATENT_LINEARS}, and make layer specs once the grid is initialized")
    return able


def mended_mlps(layer_spec: Any, config: TransformerConfig) -> Any:
    """The spec with MLPs and experts that train right where stock's do not, for stock attention, too.

    Experts have whole gradients and norms on every layout, and MLPs with biases can be recomputed.
    """
    mended = MARKED_EXPERTS | (OWN_BIAS if recomputes_mlp(config) else {})
    return with_replacements(layer_spec, {stock: Replacement(ours) for stock, ours in mended.items()})


def sequence_parallel_norms(
    layer_spec: ModuleSpec | TransformerBlockSubmodules,
    config: TransformerConfig,
    vp_stage: int | None = None,
) -> ModuleSpec | TransformerBlockSubmodules:
    """The spec with norms that sequence parallelism can use, for stock attention as well as the grid's.

    A layer spec becomes a block spec, of the layers of this (virtual) pipeline stage, where the block's final norm has
    to change too.
    """
    if not config.sequence_parallel:
        return layer_spec
    block, layers = layer_spec, (TransformerBlock, BaseTransformerLayer)
    if isinstance(layer_spec, ModuleSpec) and issubclass(get_module(layer_spec), layers):
        block = _get_block_submodules(config, layer_spec, vp_stage)
    swapped = with_replacements(block, {WrappedTorchNorm: Replacement(SequenceParallelTorchNorm)})
    return layer_spec if swapped is block else swapped
