"""What keeps multi-latent attention (MLA) off a grid."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hp_plugin.config import HeadDimConfig
from hp_plugin.exchange.advice import unsupported_by
from hp_plugin.exchange.rules import RULES, candidates
from hp_plugin.exchange.shapes import stock_core_alone
from hp_plugin.exchange.sizes import AttentionShape
from hp_plugin.grid.ranks import DIM_INNERMOST
from hp_plugin.refusal import Refusal

LATENT_LINEARS = (
    "multi-latent attention (MLA) on a grid gathers the weights of Megatron-Core's own linears: give "
    "--transformer-impl local"
)
"""What other linears are told."""


def latent_refusals(config: Any, head_dim: HeadDimConfig, shape: AttentionShape | None) -> list[Refusal]:
    """What a model with multi-latent attention asks for and this grid cannot do; empty if nothing.

    Args:
        config: the model's configuration, or arguments under the same names.
        shape: a layer's shape if it is known.
    """
    able = [name for name in candidates(head_dim.exchange, head_dim.n) if RULES[name].latent]
    if head_dim.n > 1 and not able:
        others = " or ".join(name for name, rule in RULES.items() if rule.latent)
        said = (
            f"multi-latent attention (MLA) has no per-head slices that exchange `{head_dim.exchange}` could trade: use "
            f"--head-dim-exchange {others}, or --tensor-model-parallel-size alone"
        )
        return [Refusal("feature", said)]
    refusals = [
        Refusal("feature", f"multi-latent attention (MLA) {said}")
        for said in (*_features(config), *_uneven(config, head_dim))
    ]
    if min(head_dim.m, head_dim.n) > 1 and head_dim.order != DIM_INNERMOST:
        said = f"shards weights in the order of the ranks: give --head-dim-order {DIM_INNERMOST}"
        refusals.append(Refusal("feature", f"multi-latent attention (MLA) {said}"))
    if able and head_dim.exchange not in RULES:  # left open, but there is nothing to choose
        refusals += unsupported_by(able[0], config, stock_core_alone(config), shape)
        refused = None if shape is None else RULES[able[0]].refusal(shape)
        refusals += [] if refused is None else [refused]
    return refusals


def _features(config: Any) -> Iterator[str]:
    """What stock's multi-latent attention can do and the grid's cannot."""
    wanted = (
        *((True, what) for what in stock_core_alone(config)),
        (getattr(config, "cache_mla_latents", False), "keep latents in a cache (cache_mla_latents)"),
        (getattr(config, "qk_clip", False), "do QK-clip"),
        (getattr(config, "log_max_attention_logit", False), "do --log-max-attention-logit"),
    )
    yield from (f"on a grid cannot {what}" for asked, what in wanted if asked)
    # The kernel rotates by positions of whole sequences. Without a name the type is yarn, and fusion is on by default.
    if getattr(config, "apply_rope_fusion", False) and getattr(config, "rope_type", None) in (None, "yarn"):
        yield "on a grid rotates a share of the tokens: give --no-rope-fusion"


def _uneven(config: Any, head_dim: HeadDimConfig) -> Iterator[str]:
    """Weights that do not divide over the ranks."""
    h, rope = config.num_attention_heads, getattr(config, "qk_pos_emb_head_dim", None)
    if h is None or rope is None:  # arguments that do not say it
        return
    sharded = {
        "heads of queries": h * (config.qk_head_dim + rope),
        "heads of keys and values": h * (config.qk_head_dim + config.v_head_dim),
        "heads of outputs": h * config.v_head_dim,
        # Stock's attention makes a projection of these first, whatever becomes of it.
        "heads of kv_channels": h * (config.kv_channels or 0),
        "latents of keys and values, with their rotary channels": config.kv_lora_rank + rope,
        "latents of queries": config.q_lora_rank or 0,
    }
    for what, channels in sharded.items():
        if channels % head_dim.size:
            yield f"has {channels} channels of {what}, which do not divide over {head_dim.size} ranks"
