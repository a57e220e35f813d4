"""Megatron-Core's TransformerConfig with a grid in it, and everything the grid refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig

from hp_plugin.config import HeadDimConfig
from hp_plugin.exchange.rule import AttentionShape
from hp_plugin.exchange.rules import RULES


@dataclass
class HeadDimTransformerConfig(TransformerConfig):
    """`TransformerConfig` whose attention runs on an m × n grid: m, not the TP size, divides heads and query groups.

    Args:
        head_dim_parallel: the grid, or None for stock attention. Sets `tensor_model_parallel_size` to m · n.
        micro_batch_size, seq_length: if given, the exchange is checked against them when the config is made.

    Raises:
        ValueError: the grid does not fit the model, or the model needs something the grid cannot carry.
    """

    head_dim_parallel: HeadDimConfig | None = None
    micro_batch_size: int | None = None
    seq_length: int | None = None

    def __post_init__(self) -> None:
        if self.head_dim_parallel is None:
            super().__post_init__()
            return
        grid = self.head_dim_parallel
        if self.tensor_model_parallel_size == 1:
            self.tensor_model_parallel_size = grid.size
        post_init_on_grid(self, grid, super().__post_init__)
        if grid.n > 1 and self.micro_batch_size is not None and self.seq_length is not None:
            grid.check_shape(attention_shape(self, grid, self.micro_batch_size, self.seq_length))


def attention_shape(config: TransformerConfig, grid: HeadDimConfig, b: int, s: int, rotary: int = 0) -> AttentionShape:
    """The shape of one attention layer; b and s as the layer sees them, `rotary` rotated channels per head."""
    norm = None
    if config.qk_layernorm:
        norm = "L2Norm" if getattr(config, "qk_l2_norm", False) else config.normalization
    return AttentionShape(
        s=s,
        b=b,
        h=config.num_attention_heads,
        g=config.num_query_groups or config.num_attention_heads,
        d=config.kv_channels or config.hidden_size // config.num_attention_heads,
        m=grid.m,
        n=grid.n,
        gate=getattr(config, "attention_output_gate", False),
        rotary=rotary,
        rotary_interleaved=config.rotary_interleaved,
        qk_norm=norm,
    )


def post_init_on_grid(config: TransformerConfig, grid: HeadDimConfig, stock_post_init: Callable[[], None]) -> None:
    """Runs Megatron-Core's own `__post_init__` for a model on a grid; true head counts stand before and after.

    Its only two checks that the grid replaces demand that the TP size divide heads and query groups; they see h · n
    heads and g · n groups, which m · n divides exactly when m divides h and g.

    Raises:
        ValueError: as `HeadDimConfig.check_heads`, a contradicting TP size, or an unsupported feature.
    """
    grid.check_tensor_parallel_size(config.tensor_model_parallel_size)
    h = config.num_attention_heads
    g = config.num_query_groups or h
    config.kv_channels = config.kv_channels or config.hidden_size // h
    grid.check_heads(h, g, config.kv_channels)
    config.num_attention_heads, config.num_query_groups = h * grid.n, g * grid.n
    try:
        stock_post_init()
    finally:
        config.num_attention_heads, config.num_query_groups = h, g
    refusals = unsupported(config, grid, grid.exchange)
    if refusals:
        raise ValueError(f"--head-dim-parallel {grid.m},{grid.n}: " + "; ".join(refusals))


def unsupported(config: Any, grid: HeadDimConfig, exchange: str) -> list[str]:
    """What this model asks for and the grid cannot do under this exchange, in words; empty if nothing.

    `auto` is asked only for what no exchange can do: what it resolves to is asked again when it is known.
    """
    if grid.n == 1 and grid.m == 1:
        return []
    said = []
    if getattr(config, "multi_latent_attention", False):
        said.append("multi-latent attention (MLA) has no per-head slices: use --tensor-model-parallel-size alone")
    variant = getattr(config, "experimental_attention_variant", None)
    if variant is not None:
        said.append(f"experimental attention variant {variant!r} is not attention over heads the grid can slice")
    if grid.n == 1:
        return said
    if getattr(config, "softmax_type", "vanilla") == "learnable":
        said.append(
            "a learnable softmax offset would get the gradient of one rank's share only: use n=1 "
            "or --softmax-type vanilla"
        )
    if getattr(config, "qk_clip", False):
        said.append("QK-clip rescales weight rows by whole heads, which slices do not hold: use n=1")
    if getattr(config, "log_max_attention_logit", False):
        said.append("--log-max-attention-logit reads whole heads of the whole micro-batch: use n=1")
    rule = RULES.get(exchange)  # None: `auto`
    if rule is not None and not rule.exact and hasattr(config, "yarn_rotary_scaling_factor"):
        said.append(f"`{exchange}` cannot place YaRN frequencies on slices: use an exact exchange")
    if rule is None or rule.stock_core:
        return said
    for wanted, what in (
        (getattr(config, "softmax_type", "vanilla") != "vanilla", "a softmax offset"),
        (config.context_parallel_size > 1, f"context parallelism ({config.context_parallel_size})"),
        (getattr(config, "flash_decode", False), "flash decoding"),
        (getattr(config, "fused_single_qkv_rope", False), "--fused-single-qkv-rope"),
        (getattr(config, "fine_grained_activation_offloading", False), "fine-grained activation offloading"),
    ):
        if wanted:
            said.append(f"exchange `{exchange}` cannot do {what}; --head-dim-exchange batch can")
    return said
