"""What a model's configuration says of the shapes that exchange rules ask for."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig

from hp_plugin.config import HeadDimConfig
from hp_plugin.exchange.sizes import AttentionShape


def attention_shape(
    config: TransformerConfig,
    head_dim: HeadDimConfig,
    b: int,
    s: int,
    rotary: int = 0,
    alone: tuple[str, ...] = (),
) -> AttentionShape:
    """The shape of one attention layer; b and s as the layer sees them, `rotary` rotated channels per head.

    `alone` is what a pass asks for, beside the configuration, that only stock's inner attention does.
    """
    norm, latent = None, getattr(config, "multi_latent_attention", False)
    if config.qk_layernorm:
        norm = "L2Norm" if getattr(config, "qk_l2_norm", False) else config.normalization
    return AttentionShape(
        s=s,
        b=b,
        h=config.num_attention_heads,
        g=config.num_query_groups or config.num_attention_heads,
        # No channels of latent heads are cut: any number will do.
        d=head_dim.n if latent else config.kv_channels or config.hidden_size // config.num_attention_heads,
        m=head_dim.m,
        n=head_dim.n,
        gate=getattr(config, "attention_output_gate", False),
        rotary=rotary,
        rotary_interleaved=config.rotary_interleaved,
        qk_norm=norm,
        stock_core_alone=(*stock_core_alone(config), *alone),
    )


def stock_core_alone(config: Any) -> tuple[str, ...]:
    """What a model asks for that only stock's inner attention does, each as what the others cannot."""
    wanted = (
        (getattr(config, "softmax_type", "vanilla") != "vanilla", "do a softmax offset"),
        (config.context_parallel_size > 1, f"do context parallelism ({config.context_parallel_size})"),
        (getattr(config, "flash_decode", False), "do flash decoding"),
        (getattr(config, "fused_single_qkv_rope", False), "do --fused-single-qkv-rope"),
        (getattr(config, "fine_grained_activation_offloading", False), "do fine-grained activation offloading"),
    )
    return tuple(what for asked, what in wanted if asked)
