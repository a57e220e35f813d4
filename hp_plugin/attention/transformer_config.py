"""Megatron-Core's TransformerConfig with a grid in it, and everything the grid refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from hp_plugin.attention.latent_limits import latent_refusals
from hp_plugin.attention.quantized import quantized_refusals
from hp_plugin.config import HeadDimConfig
from hp_plugin.exchange.advice import unsupported_by
from hp_plugin.exchange.rules import RULES
from hp_plugin.exchange.shapes import attention_shape, stock_core_alone
from hp_plugin.exchange.sizes import AttentionShape
from hp_plugin.refusal import Refusal, RefusedError, shorten, shown


@dataclass
class HeadDimTransformerConfig(TransformerConfig):
    """`TransformerConfig` whose attention runs on an m × n grid: m, not the TP size, divides heads and query groups.

    Args:
        head_dim_parallel: the grid (a `HeadDimConfig`, "m,n" or a pair), or None for stock attention. Sets
            `tensor_model_parallel_size` to m · n.
        head_dim_exchange, head_dim_order: what "m,n" or a pair leaves open, under the names of Megatron-LM's arguments,
            so that its `core_transformer_config_from_args` carries them; None once they are in the grid.
        micro_batch_size, seq_length: if given, the exchange is checked against them when the config is made.

    Raises:
        ValueError: the grid does not fit the model, the model needs something the grid cannot carry, or the exchange or
            the order contradicts the grid's own.
    """

    head_dim_parallel: HeadDimConfig | None = None
    head_dim_exchange: str | None = None
    head_dim_order: str | None = None
    micro_batch_size: int | None = None
    seq_length: int | None = None

    def __post_init__(self) -> None:
        exchange, order = self.head_dim_exchange, self.head_dim_order
        if self.head_dim_parallel is None:
            if exchange is not None or order is not None:
                raise ValueError(
                    f"head_dim_exchange {shown(exchange)} and head_dim_order {shown(order)} are a grid's: give "
                    "head_dim_parallel"
                )
            super().__post_init__()
            return
        head_dim = self.head_dim_parallel = HeadDimConfig.of(self.head_dim_parallel, exchange, order)
        # One place for each from here on: `dataclasses.replace` may give another grid.
        self.head_dim_exchange = self.head_dim_order = None
        self._check_sizes()
        if self.tensor_model_parallel_size == 1:
            self.tensor_model_parallel_size = head_dim.size
        post_init_on_grid(self, head_dim, super().__post_init__, self._shape)
        shape = self._shape()
        if shape is not None:
            head_dim.check_shape(shape)

    def _check_sizes(self) -> None:
        # Before they are divided by each other; stock's own defaults are 0.
        needed = ("num_layers", "hidden_size", "num_attention_heads", "tensor_model_parallel_size")
        wanted = ("num_query_groups", "kv_channels", "micro_batch_size", "seq_length")
        for name in (*needed, *(name for name in wanted if getattr(self, name) is not None)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**63:
                raise ValueError(f"{name} must be a positive integer, got {shown(value)}")

    def _shape(self) -> AttentionShape | None:
        """A layer's shape, where micro-batch and sequence are given."""
        if self.head_dim_parallel is None or self.micro_batch_size is None or self.seq_length is None:
            return None
        # How many channels rotate is the model's to say, not the configuration's; how they are paired, only if some do.
        rotary = self.kv_channels if self.rotary_interleaved else 0
        return attention_shape(self, self.head_dim_parallel, self.micro_batch_size, self.seq_length, rotary)


@dataclass
class HeadDimMLATransformerConfig(MLATransformerConfig, HeadDimTransformerConfig):
    """The same of a model with multi-latent attention, which runs on a grid where weights move."""


def post_init_on_grid(
    config: TransformerConfig,
    head_dim: HeadDimConfig,
    stock_post_init: Callable[[], None],
    shape: Callable[[], AttentionShape | None] = lambda: None,
) -> None:
    """Runs Megatron-Core's own `__post_init__` for a model on a grid; true head counts stand before and after.

    Its only two checks that the grid replaces demand that the TP size divide heads and query groups; they see h · n
    heads and g · n groups, which m · n divides exactly when m divides h and g.

    Args:
        shape: gives a layer's shape afterwards, where micro-batch and sequence are known.

    Raises:
        ValueError: as `HeadDimConfig.check_heads`, a contradicting TP size, what is not supported, or stock refuses it.
    """
    head_dim.check_tensor_parallel_size(config.tensor_model_parallel_size)
    h = config.num_attention_heads
    g = config.num_query_groups or h
    config.kv_channels = config.kv_channels or config.hidden_size // h
    head_dim.check_heads(h, g, head_dim.n if getattr(config, "multi_latent_attention", False) else config.kv_channels)
    config.num_attention_heads, config.num_query_groups = h * head_dim.n, g * head_dim.n
    try:
        stock_post_init()
    except Exception as refusal:
        # Of whatever kind, in whatever length: stock's checks assume values of the right types.
        said = shorten(str(refusal), 200) or type(refusal).__name__
        raise ValueError(f"Megatron-Core refuses this model: {said}") from refusal
    finally:
        config.num_attention_heads, config.num_query_groups = h, g
    check_supported(config, head_dim, shape())


def check_supported(config: Any, head_dim: HeadDimConfig, shape: AttentionShape | None = None) -> None:
    """Refuses a model that asks for what the grid cannot do; see `unsupported`.

    Raises:
        RefusedError: names all of it.
    """
    refusals = unsupported(config, head_dim, shape)
    if refusals:
        raise RefusedError(refusals, f"--head-dim-parallel {head_dim.flag}: ")


def unsupported(config: Any, head_dim: HeadDimConfig, shape: AttentionShape | None = None) -> list[Refusal]:
    """What this model asks for and the grid cannot do under its exchange, whatever the micro-batch; empty if nothing.

    `auto` is asked only for what no exchange can do: what it may choose depends on the shape of each micro-batch.

    Args:
        config: the model's configuration, or arguments under the same names.
        shape: a layer's shape if it is known, so that exchanges are named as a way out only where they fit it.
    """
    if head_dim.size == 1:
        return []
    refusals = []
    if getattr(config, "multi_latent_attention", False):
        refusals += latent_refusals(config, head_dim, shape)
    variant = getattr(config, "experimental_attention_variant", None)
    if variant is not None:
        said = f"experimental attention variant {shown(variant)} is not attention over heads the grid can slice"
        refusals.append(Refusal("feature", said))
    for name in ("gtp_weight_remat_size", "expert_gtp_weight_remat_size"):
        if getattr(config, name, 1) > 1:
            said = f"{name} {shown(getattr(config, name))}: GTP shards weights across the grid's pieces; leave it out"
            refusals.append(Refusal("feature", said))
    if head_dim.n == 1:
        return refusals
    whole = head_dim.without_slices(config.num_attention_heads, config.num_query_groups)
    if getattr(config, "softmax_type", "vanilla") == "learnable":
        said = f"a learnable softmax offset would get the gradient of one rank's share only: {whole}"
        refusals.append(Refusal("feature", f"{said}, or --softmax-type vanilla"))
    if getattr(config, "qk_clip", False):
        said = f"QK-clip rescales weight rows by whole heads, which slices do not hold: {whole}"
        refusals.append(Refusal("feature", said))
    if getattr(config, "log_max_attention_logit", False):
        said = f"--log-max-attention-logit reads whole heads of the whole micro-batch: {whole}"
        refusals.append(Refusal("feature", said))
    refusals += quantized_refusals(config, head_dim, whole)
    if head_dim.exchange not in RULES:  # none was asked for by name
        return refusals
    return [*refusals, *unsupported_by(head_dim.exchange, config, stock_core_alone(config), shape)]
