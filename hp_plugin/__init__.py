"""Attention on an m x n grid of head groups and head-dimension slices, for Megatron-Core and DeepSpeed."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hp_plugin.attention.layers import HeadDimColumnParallelLinear, HeadDimRowParallelLinear
    from hp_plugin.attention.registration import initialize_head_dim_parallel
    from hp_plugin.attention.self_attention import HeadDimSelfAttention
    from hp_plugin.attention.specs import head_dim_spec
    from hp_plugin.attention.transformer_config import HeadDimMLATransformerConfig, HeadDimTransformerConfig
    from hp_plugin.config import HeadDimConfig
    from hp_plugin.grid.groups import HeadDimGroups
    from hp_plugin.grid.ranks import Grid

__version__ = "0.2.0"

__all__ = [
    "Grid",
    "HeadDimColumnParallelLinear",
    "HeadDimConfig",
    "HeadDimGroups",
    "HeadDimMLATransformerConfig",
    "HeadDimRowParallelLinear",
    "HeadDimSelfAttention",
    "HeadDimTransformerConfig",
    "head_dim_spec",
    "initialize_head_dim_parallel",
]

# Loaded on first use: the command line and everything that only counts must run where torch is not installed.
_HOME = {
    "Grid": "hp_plugin.grid.ranks",
    "HeadDimColumnParallelLinear": "hp_plugin.attention.layers",
    "HeadDimConfig": "hp_plugin.config",
    "HeadDimGroups": "hp_plugin.grid.groups",
    "HeadDimMLATransformerConfig": "hp_plugin.attention.transformer_config",
    "HeadDimRowParallelLinear": "hp_plugin.attention.layers",
    "HeadDimSelfAttention": "hp_plugin.attention.self_attention",
    "HeadDimTransformerConfig": "hp_plugin.attention.transformer_config",
    "head_dim_spec": "hp_plugin.attention.specs",
    "initialize_head_dim_parallel": "hp_plugin.attention.registration",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
