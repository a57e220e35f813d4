"""Asks a model that has been built whether its mixtures of experts are DeepSpeed's."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from hp_plugin.deepspeed_adapter.moe.layer import DeepSpeedMoELayer


def check_mixtures(model: nn.Module, config: TransformerConfig) -> None:
    """Refuses a model, or a pipeline stage of one, whose mixtures `deepspeed_moe_spec` did not reach.

    Raises:
        RuntimeError: there is one of Megatron's, or none where `moe_layer_freq` says that there is one.
    """
    theirs = [name for name, module in model.named_modules() if isinstance(module, MoELayer)]
    ours = [name for name, module in model.named_modules() if isinstance(module, DeepSpeedMoELayer)]
    if theirs:
        raise RuntimeError(
            f"--moe-backend deepspeed: {len(theirs)} mixtures of experts were built as Megatron's ({theirs[0]}): their "
            "layer spec is made in a way that this hp_plugin does not know"
        )
    numbers = [layer.layer_number for layer in getattr(getattr(model, "decoder", None), "layers", ())]
    due = [number for number in numbers if _is_mixture(number, config.moe_layer_freq)]
    if due and not ours:
        raise RuntimeError(
            f"--moe-backend deepspeed: layers {due} are to be mixtures of {config.num_moe_experts} experts "
            f"(--moe-layer-freq {config.moe_layer_freq}), and the model was built with none"
        )


def _is_mixture(layer_number: int, freq: Any) -> bool:
    """As stock's layer specs read it; layers count from 1."""
    return bool(freq[layer_number - 1]) if isinstance(freq, list) else (layer_number - 1) % freq == 0
