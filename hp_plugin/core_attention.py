"""The stock inner attention, and beside it those that the exchanges `sequence` and `scores` bring."""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from hp_plugin.exchange import Exchange
from hp_plugin.exchange.sequence import SequenceExchange
from hp_plugin.groups import HeadDimGroups
from hp_plugin.inner_attention.dropout_rng import HEAD_PARALLEL_RNG, ensure_head_parallel_rng
from hp_plugin.inner_attention.scores import ScoresSettings, scores_attention
from hp_plugin.inner_attention.sequence import sequence_attention


class HeadDimCoreAttention:
    """Mixed into the core attention that the stock spec names; parameter-free, so checkpoint keys stay stock.

    Which attention runs follows from the shapes alone, because selective recompute calls again in backward, when
    `auto` may already have picked another exchange for the next micro-batch: slices of heads are `scores`, fewer
    queries than keys are `sequence` (unless `caching`, as in stock inference), anything else is stock.
    """

    def __init__(
        self,
        *args: Any,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        groups: HeadDimGroups,
        exchanges: dict[str, Exchange],
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **kwargs: Any,
    ) -> None:
        inner = copy.copy(config)
        # Transformer Engine divides heads by the config's TP size; here they are divided over the head group.
        inner.tensor_model_parallel_size = pg_collection.tp.size()
        super().__init__(
            *args,
            config=inner,
            layer_number=layer_number,
            attn_mask_type=attn_mask_type,
            softmax_scale=softmax_scale,
            pg_collection=pg_collection,
            **kwargs,
        )
        self._groups = groups
        self._exchanges = exchanges
        self._channels = config.kv_channels
        self._scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale
        self._dropout = config.attention_dropout
        self._mask_type = attn_mask_type
        windowed = is_layer_window_attention(
            config.window_size, getattr(config, "window_attn_skip_freq", None), layer_number
        )
        self._window = tuple(config.window_size) if windowed else None
        self.caching = False

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Tensor:
        if query.shape[-1] != self._channels:
            return self._scores(query, key, value, self._effective_mask(attention_mask))
        if "sequence" in self._exchanges and query.shape[0] != key.shape[0] and not self.caching:
            return self._sequence(query, key, value, self._effective_mask(attention_mask))
        return super().forward(query, key, value, attention_mask, **kwargs)

    def _effective_mask(self, mask: Tensor | None) -> Tensor | None:
        """The mask that the stock class would heed: Transformer Engine's ignores one beside a causal mask type."""
        local = isinstance(self, DotProductAttention)
        return mask if local or self._mask_type != AttnMaskType.causal else None

    def _sequence(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        exchange = self._exchanges["sequence"]
        assert isinstance(exchange, SequenceExchange)

        def attend(dropout: float) -> Tensor:
            return sequence_attention(
                query,
                key,
                value,
                chunks=exchange.own_chunks,
                mask=mask,
                causal=self._mask_type == AttnMaskType.causal,
                window=self._window,
                scale=self._scale,
                dropout=dropout,
            )

        if not (self.training and self._dropout):
            return attend(0.0)
        with get_cuda_rng_tracker().fork():
            return attend(self._dropout)

    def _scores(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        def attend(dropout: float, rng_state: Tensor | None) -> Tensor:
            settings = ScoresSettings(
                self._groups.dim,
                self._mask_type == AttnMaskType.causal,
                self._window,
                self._scale,
                dropout,
                rng_state,
            )
            return scores_attention(query, key, value, mask, settings)

        if not (self.training and self._dropout):
            return attend(0.0, None)
        ensure_head_parallel_rng(self._groups.dim)
        with get_cuda_rng_tracker().fork(HEAD_PARALLEL_RNG):
            state = torch.cuda.get_rng_state(query.device) if query.is_cuda else torch.get_rng_state()
            return attend(self._dropout, state)
