"""Models that could choose to move weights, and are not to."""

from __future__ import annotations

from torch import nn

from hp_plugin.exchange.replicas import mark_partial
from hp_plugin.exchange.weights.layers import WeightsTransformerLayer


def keep_weights(model: nn.Module) -> None:
    """From now on activations move in every pass of this model: what it runs in cannot have weights gathered.

    Raises:
        ValueError: its exchange leaves no choice.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, WeightsTransformerLayer)]
    for layer in layers:
        layer.block.choice.keep_weights()
    if layers:
        for parameter in model.parameters():
            mark_partial(parameter, False)
