"""Multi-latent attention (MLA) on a grid whose weights move: stock's, on the head group and a share of the tokens.

Heads are not sliced. Every rank holds stock's TP = P shard of each linear, contiguous rows or columns, also where P
does not divide the heads; the n shards of a dim group are those of its whole heads.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec, get_module
from megatron.core.transformer.transformer_config import MLATransformerConfig
from torch import Tensor, nn

from hp_plugin.attention.layers import submodule_spec
from hp_plugin.attention.on_grid import GridAttention, groups_of, stock_collection
from hp_plugin.attention.transformer_config import check_supported
from hp_plugin.exchange.replicas import take_from_one
from hp_plugin.exchange.rules import candidates
from hp_plugin.exchange.shapes import attention_shape
from hp_plugin.exchange.strategies import STRATEGIES
from hp_plugin.exchange.strategy import CoreSettings, Exchange, QKVLayout


class _OverAllRanks:
    """A linear whose shard is a contiguous P-th, whatever group stock's attention runs on."""

    def __init__(self, *args: Any, groups: Any, tp_group: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, tp_group=groups.tp, **kwargs)


class LatentColumnLinear(_OverAllRanks):
    """Column-parallel: from tokens or latents to heads."""

    shard_dim = 0


class LatentRowLinear(_OverAllRanks):
    """Row-parallel: from heads to tokens."""

    shard_dim = 1


class LatentDownLinear(LatentColumnLinear):
    """Column-parallel, from tokens to latents that all heads share; returns all channels of this rank's own tokens.

    Stock gathers them itself, over the TP group that is registered, which is not the one that it runs on here.

    Args:
        shared: the last channels, which each rank of a head group uses for its own heads without a linear in between.
    """

    def __init__(self, *args: Any, shared: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._shared = shared

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        part, bias = super().forward(*args, **kwargs)
        head = self.tp_group
        if head.size() == 1:
            return part, bias
        # [s, b, channels/m] -> [s, b, channels]
        latents = gather_from_tensor_model_parallel_region(part, group=head)
        if self.sequence_parallel:
            return scatter_to_sequence_parallel_region(latents, group=head), bias
        if self._shared:
            own, shared = latents.split([latents.shape[-1] - self._shared, self._shared], dim=-1)
            latents = torch.cat((own, copy_to_tensor_model_parallel_region(shared, group=head)), dim=-1)
        return latents, bias


class _TakenForColumnParallel(ModuleSpec):
    """A spec that stock takes for its column-parallel linear: it asks, by equality, whether it knows the linear."""

    def __eq__(self, other: object) -> bool:
        return other is ColumnParallelLinear

    __hash__ = None  # type: ignore[assignment]


class HeadDimLatentAttention(GridAttention, MLASelfAttention):
    """`MLASelfAttention` whose heads are split over the head axis, where the ranks of the dim axis gather its weights.

    Args:
        config: an `MLATransformerConfig` with a `head_dim_parallel`.
        pg_collection: process groups, with `head` and `dim` if they are not the registered ones.
        exchanges: those that the layer around can run.

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
        exchanges: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        head_dim = config.head_dim_parallel
        groups = groups_of(head_dim, pg_collection)
        check_supported(config, head_dim)
        collection = copy.copy(pg_collection) if pg_collection is not None else stock_collection()
        collection.tp = groups.head
        heads = config.num_attention_heads // head_dim.m
        names = exchanges or candidates(head_dim.exchange, head_dim.n, whole_layers=False)
        strategy = STRATEGIES[next(name for name in names if STRATEGIES[name].rule.latent)]
        exchange = strategy(groups, QKVLayout(heads, 1, 0))

        def linear(kind: type, stock: Any, **params: Any) -> Any:
            if stock is None:
                return None
            mixin, more = exchange.parallel_linear(kind, 1)
            return submodule_spec(mixin, stock, groups=groups, **more, **params)

        def down(stock: Any, shared: int) -> Any:
            made = linear(LatentDownLinear, stock, shared=shared)
            if made is None or get_module(stock) is not ColumnParallelLinear:
                return made
            return _TakenForColumnParallel(made.module, made.params, made.submodules)

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
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        rotary_pos_emb: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As stock, on this rank's share; rotary positions are its own.

        Raises:
            RuntimeError: the layer around is none that gathers.
            ValueError: what multi-latent attention cannot do on a grid.
        """
        if self.passing is None or self.passing.share is None:
            raise RuntimeError("multi-latent attention on a grid gathers weights: build the model from head_dim_spec")
        for name in ("packed_seq_params", "inference_context", "inference_params"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name}: multi-latent attention on a grid takes whole micro-batches, in training")
        carried = self._carried
        if carried.separates and not isinstance(self.core_attention, LatentCoreAttention):
            raise ValueError(
                f"{self.passing.b} samples cannot be spread over n={self.head_dim.n} ranks, and tokens not under "
                f"{type(self.core_attention).__mro__[-2].__module__}: take a multiple, or --transformer-impl local"
            )
        return super().forward(hidden_states, carried.mask_share(attention_mask), *args, **kwargs)

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        """As stock; where tokens are spread, keys and values of all of them."""
        query, key, value, *rest = super().get_query_key_value_tensors(*args, **kwargs)
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
        self._how = CoreSettings(
            causal=attn_mask_type == AttnMaskType.causal,
            window=None,
            scale=config.kv_channels**-0.5 if softmax_scale is None else softmax_scale,
            dropout=config.attention_dropout,
            own_stream=config.sequence_parallel,
        )

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **of_stock: Any
    ) -> Tensor:
        """`[s, b, h/m, channels]`, of keys those of all tokens, to `[s, b, h/m · channels of values]`."""
        how = replace(self._how, dropout=self._how.dropout if self.training else 0.0)
        return self._exchange.attend(query, key, value, attention_mask, how)
