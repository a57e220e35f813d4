"""Asks a model that has been built whether its attention is where its configuration says."""

from __future__ import annotations

from megatron.core.transformer.attention import Attention
from torch import nn

from hp_plugin.attention.on_grid import GridAttention


def check_attention(model: nn.Module) -> None:
    """Refuses a model on a grid with attention that is not: a spec has a shape that `head_dim_spec` does not know.

    Raises:
        RuntimeError: names the first such layers.
    """
    attention = {name: module for name, module in model.named_modules() if isinstance(module, Attention)}
    off = [name for name, module in attention.items() if not isinstance(module, GridAttention)]
    if off:
        raise RuntimeError(
            f"--head-dim-parallel: {len(off)} of {len(attention)} attention layers were built off the grid "
            f"({', '.join(off[:3])}): their layer spec is made in a way that this hp_plugin does not know"
        )
