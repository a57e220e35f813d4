"""The stock inner attention, and beside it those that exchanges bring."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from hp_plugin.exchange.masks import names_documents
from hp_plugin.exchange.strategy import CoreSettings, Exchange, Turn


def layer_window(config: TransformerConfig, layer_number: int) -> tuple[int, int] | None:
    """The (left, right) window of a layer, in positions, -1 for unlimited; None where it sees everything."""
    skipped = getattr(config, "window_attn_skip_freq", None)
    windowed = is_layer_window_attention(config.window_size, skipped, layer_number)
    return tuple(config.window_size) if windowed else None


def core_settings(
    config: TransformerConfig, layer_number: int, attn_mask_type: AttnMaskType, softmax_scale: float | None
) -> CoreSettings:
    """What a layer's inner attention does where an exchange attends, as stock's is told at its construction."""
    return CoreSettings(
        causal=attn_mask_type == AttnMaskType.causal,
        window=layer_window(config, layer_number),
        scale=config.kv_channels**-0.5 if softmax_scale is None else softmax_scale,
        dropout=config.attention_dropout,
        own_stream=config.sequence_parallel,
    )


class HeadDimCoreAttention:
    """Mixed into the core attention that the stock spec names; parameter-free, so checkpoint keys stay stock.

    The exchanges say by shape alone which call is theirs, because selective recompute calls again in backward, when
    `auto` may already have picked another exchange for the next micro-batch; anything else is stock. Beside a cache
    keys outnumber queries anyway and nothing is recomputed: only the pass's own exchange is asked.
    """

    def __init__(
        self,
        *args: Any,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        exchanges: Collection[Exchange],
        turn: Turn,
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
        self._exchanges, self._turn, self._mask_type = exchanges, turn, attn_mask_type
        self._how = core_settings(config, layer_number, attn_mask_type, softmax_scale)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Tensor:
        caching = self._turn.caching
        for exchange in (self._turn.exchange,) if caching else self._exchanges:
            if exchange.attends(query, key, caching):
                how = replace(self._how, dropout=self._how.dropout if self.training else 0.0)
                return exchange.attend(query, key, value, self._effective_mask(attention_mask), how)
        return super().forward(query, key, value, attention_mask, **kwargs)

    def _effective_mask(self, mask: Tensor | None) -> Tensor | None:
        """The mask that the stock class would heed: Transformer Engine's ignores one beside a causal mask type."""
        local = isinstance(self, DotProductAttention) or names_documents(mask)
        return mask if local or self._mask_type != AttnMaskType.causal else None
