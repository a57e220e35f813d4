"""`sequence` beside a cache: every rank attends with all queries, each to the tokens that it caches."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
    _yarn_get_concentration_factor_from_config,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from hp_plugin.exchange.rule import ExchangeRule
from hp_plugin.exchange.sequence.cache import TokenCache
from hp_plugin.exchange.sequence.partial import join, partial_attention
from hp_plugin.exchange.strategy import QKV, Angles, CoreSettings, Exchange, QKVLayout
from hp_plugin.grid.groups import HeadDimGroups


class SpreadTokens(Exchange):
    """One pass of any number of tokens, whose keys and values lie with the others of their blocks.

    One all-gather over the dim axis makes whole heads of the slices, of which a rank keeps the keys and values that are
    its own to cache; one all-to-all gives every rank its slices of all outputs.
    """

    separates = True

    def __init__(self, rule: ExchangeRule, groups: HeadDimGroups, layout: QKVLayout, cache: TokenCache) -> None:
        super().__init__(groups, layout)
        self.rule, self._cache = rule, cache

    def stock_cache(self, context: Any, layer: int, key: Tensor) -> None:
        """Nothing for stock to cache."""
        return None

    def to_heads(self, mixed: Tensor) -> QKV:
        """[s, b, slots · d/n] -> queries [s, b, h/m, d], keys and values [own tokens, b, g/m, d].

        Gates stay slices, [s, b, h/m, d/n], as the outputs will be.
        """
        layout = self.layout
        slots = mixed.unflatten(2, (layout.kv_groups, layout.query_slots + 2, layout.width))
        query, gate, keys_values = slots.split([layout.queries, layout.query_slots - layout.queries, 2], dim=3)
        sent = torch.cat((query, keys_values), dim=3) if layout.gate else slots
        # Laid side by side as gloo demands: [n · s, b, g/m, h/g + 2, d/n]
        parts = sent.new_empty((self.n * sent.shape[0], *sent.shape[1:]))
        dist.all_gather_into_tensor(parts, sent.contiguous(), group=self.groups.dim)
        # [n, s, b, g/m, h/g + 2, d/n] -> [s, b, g/m, h/g + 2, d]
        whole = parts.unflatten(0, (self.n, -1)).movedim(0, -2).flatten(4)
        query, keys_values = whole.split([layout.queries, 2], dim=3)
        key, value = self._cache.own(keys_values).unbind(dim=3)
        return QKV(query.flatten(2, 3), gate.flatten(2, 3) if layout.gate else None, key, value)

    def to_slices(self, context: Tensor) -> Tensor:
        """Slices already."""
        return context

    def split_angles(self, angles: Angles, config: TransformerConfig) -> tuple[Angles, Angles]:
        """All by `rotated`: stock's kernels cannot be asked to rotate no key at all."""
        query, key = (None if angle is None else self._cache.of_pass(angle) for angle in angles)
        return (None, None), (query, None if key is None else self._cache.own(key))

    def rotated(self, query: Tensor, key: Tensor, angles: Angles, config: TransformerConfig) -> tuple[Tensor, Tensor]:
        """Each token by its own position, as stock does it."""
        mscale = _yarn_get_concentration_factor_from_config(config)
        rotated = [
            apply_rotary_pos_emb(states, angle, config, mscale=mscale) if angle is not None and len(states) else states
            for states, angle in zip((query, key), angles, strict=True)
        ]
        return rotated[0], rotated[1]

    def attends(self, query: Tensor, key: Tensor, caching: bool) -> bool:
        """Whatever comes while it is its turn."""
        return True

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, how: CoreSettings) -> Tensor:
        """[s, b, h/m · d/n]: attention to what is cached here, joined with what the others found."""
        self._cache.keep(key, value)
        keys, values, positions = self._cache.read(key)
        output, sums = partial_attention(
            query,
            keys,
            values,
            positions,
            start=self._cache.start,
            mask=None if mask is None else mask.index_select(3, positions),
            causal=how.causal,
            window=how.window,
            scale=how.scale,
        )
        return join(output, sums, self.groups.dim).flatten(2)
