"""Multi-latent attention (MLA) on a grid whose weights move: stock's, on the head group and a share of the tokens.

Heads are not sliced. Every rank holds stock's TP = P shard of each linear, contiguous rows or columns, also where P
does not divide the heads; the n shards of a dim group are those of its whole heads. With n = 1 nothing is gathered.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec, get_module
from megatron.core.transformer.transformer_config import MLATransformerConfig
from torch import Tensor, nn

from hp_plugin.attention.core_attention import core_settings
from hp_plugin.attention.latent_limits import LATENT_LINEARS
from hp_plugin.attention.latent_linears import (
    LatentColumnLinear,
    LatentDownLinear,
    LatentRowLinear,
    TakenForColumnParallel,
)
from hp_plugin.attention.layers import submodule_spec
from hp_plugin.attention.on_grid import GridAttention, groups_of, stock_collection
from hp_plugin.attention.transformer_config import check_supported
from hp_plugin.exchange.replicas import take_from_one
from hp_plugin.exchange.shapes import attention_shape
from hp_plugin.exchange.strategies import STRATEGIES
from hp_plugin.exchange.strategy import Exchange, QKVLayout


class HeadDimLatentAttention(GridAttention, MLASelfAttention):
    """`MLASelfAttention` whose heads are split over the head axis, where the ranks of the dim axis gather its weights.

    Args:
        config: an `MLATransformerConfig` with a `head_dim_parallel`.
        pg_collection: process groups, with `head` and `dim` if they are not the registered ones.

    Raises:
        ValueError: the model needs what the grid or its exchange cannot do.
        RuntimeError: no grid is registered, or it is not the config's.
    """

    def __init__(
        self,
        config: MLATransformerConfig,
        submodules: MLASelfAttentionSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.padding,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **kwargs: Any,
    ) -> None:
        head_dim = config.head_dim_parallel
        groups = groups_of(head_dim, pg_collection)
        check_supported(config, head_dim)
        collection = copy.copy(pg_collection) if pg_collection is not None else stock_collection()
        collection.tp = groups.head
        heads = config.num_attention_heads // head_dim.m
        strategy = next(strategy for strategy in STRATEGIES.values() if strategy.rule.latent)
        exchange = strategy(groups, QKVLayout(heads, 1, 0))

        def linear(kind: type, stock: Any, **params: Any) -> Any:
            if stock is None:
                return None
            if not issubclass(get_module(stock), (ColumnParallelLinear, RowParallelLinear)):
                raise ValueError(LATENT_LINEARS)
            mixin, more = exchange.parallel_linear(kind, 1) if head_dim.n > 1 else (kind, {})
            return submodule_spec(mixin, stock, groups=groups, **more, **params)

        def down(stock: Any, shared: int) -> Any:
            made = linear(LatentDownLinear, stock, shared=shared)
            return None if made is None else TakenForColumnParallel(made.module, made.params, made.submodules)

        core = submodules.core_attention
        own_core = issubclass(get_module(core), DotProductAttention)
        super().__init__(
            config,
            replace(
                submodules,
                linear_q_proj=linear(LatentColumnLinear, submodules.linear_q_proj),
                linear_q_down_proj=down(submodules.linear_q_down_proj, 0),
                linear_q_up_proj=linear(LatentColumnLinear, submodules.linear_q_up_proj),
                linear_kv_down_proj=down(submodules.linear_kv_down_proj, config.qk_pos_emb_head_dim),
                linear_kv_up_proj=linear(LatentColumnLinear, submodules.linear_kv_up_proj),
                linear_proj=linear(LatentRowLinear, submodules.linear_proj),
                # Stock's own knows one width of heads alone.
                core_attention=ModuleSpec(LatentCoreAttention, {"exchange": exchange}) if own_core else core,
            ),
            layer_number,
            attn_mask_type=attn_mask_type,
            cp_comm_type=cp_comm_type,
            pg_collection=collection,
            **kwargs,
        )
        self.head_dim, self.groups, self.true_config = head_dim, groups, config
        self._exchange = exchange
        if config.qk_layernorm and not config.sequence_parallel:
            # Stock sums its gradient over all P ranks, of which a head group's have all the same.
            names = [name for name, _ in self.q_layernorm.named_parameters(recurse=False)]
            take_from_one(self.q_layernorm, groups.coordinates[0] == 0, lambda states: names)
        if head_dim.n > 1:
            self.rotary_pos_emb.get_rotary_seq_len = lambda *args, **kwargs: self.passing.s
            self.rotary_pos_emb.register_forward_hook(self._own_angles)

    @property
    def _carried(self) -> Exchange:
        """What carries the running pass: samples, or tokens of all samples."""
        return self._exchange.at(attention_shape(self.true_config, self.head_dim, self.passing.b, self.passing.s))

    def _own_angles(self, module: nn.Module, args: Any, angles: Any) -> Any:
        """Those of this rank's tokens; yarn's come with a factor."""
        whole, *factor = angles if isinstance(angles, tuple) else (angles,)
        (own, _), _ = self._carried.split_angles((whole, whole), self.config)
        return (own, *factor) if factor else own

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """As stock, on this rank's share; rotary positions are its own.

        Raises:
            RuntimeError: the layer around is none that gathers.
            ValueError: what multi-latent attention cannot do on a grid.
        """
        for name in ("packed_seq_params", "inference_context", "inference_params"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name}: multi-latent attention on a grid takes whole micro-batches, in training")
        if self.head_dim.n == 1:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        if self.passing is None or self.passing.share is None:
            raise RuntimeError("multi-latent attention on a grid gathers weights: build the model from head_dim_spec")
        carried = self._carried
        if carried.separates and not isinstance(self.core_attention, LatentCoreAttention):
            raise ValueError(
                f"{self.passing.b} samples cannot be spread over n = {self.head_dim.n} ranks, and their tokens only "
                f"with Megatron-Core's own inner attention, not {type(self.core_attention).__name__}: take a multiple"
            )
        return super().forward(hidden_states, carried.mask_share(attention_mask), *args, **kwargs)

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        """As stock; where tokens are spread, keys and values of all of them."""
        query, key, value, *rest = super().get_query_key_value_tensors(*args, **kwargs)
        if self.head_dim.n == 1 or not self._carried.separates:
            return query, key, value, *rest
        both = self._carried.of_all_tokens(torch.cat((key, value), dim=-1))
        key, value = both.split([key.shape[-1], value.shape[-1]], dim=-1)
        return query, key, value, *rest

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Stock's of TP = P: its norms are replicated over all of the grid."""
        kept, self.tp_group = self.tp_group, self.groups.tp
        try:
            described: dict[str, Any] = super().sharded_state_dict(*args, **kwargs)
        finally:
            self.tp_group = kept
        return described


class LatentCoreAttention(nn.Module):
    """Inner attention on torch's own kernels, whose values may be narrower than queries and keys; no parameters."""

    def __init__(
        self,
        config: MLATransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str = "self",
        softmax_scale: float | None = None,
        *,
        exchange: Exchange,
        **of_stock: Any,
    ) -> None:
        super().__init__()
        self._exchange = exchange
        self._how = core_settings(config, layer_number, attn_mask_type, softmax_scale)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **of_stock: Any
    ) -> Tensor:
        """`[s, b, h/m, channels]`, of keys those of all tokens, to `[s, b, h/m · channels of values]`."""
        how = replace(self._how, dropout=self._how.dropout if self.training else 0.0)
        return self._exchange.attend(query, key, value, attention_mask, how)
