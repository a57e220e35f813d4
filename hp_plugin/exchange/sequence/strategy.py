"""`sequence`: whole heads of a share of the queries, against all keys."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.mappings import all_to_all
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from hp_plugin.exchange.sequence.attention import sequence_attention
from hp_plugin.exchange.sequence.cache import TokenCache
from hp_plugin.exchange.sequence.chunks import chunks_of, in_order, own_tokens, spread
from hp_plugin.exchange.sequence.rule import SequenceRule
from hp_plugin.exchange.sequence.spread import SpreadTokens
from hp_plugin.exchange.sizes import AttentionShape
from hp_plugin.exchange.strategy import QKV, Angles, CoreSettings, Exchange


class SequenceExchange(Exchange):
    """Every rank trades its d/n slice of s queries for the full d of s/n queries; keys and values come whole.

    Rank j takes query chunks j and 2n-1-j of 2n, an early and a late one, so that causal work is the same on every
    rank. One all-to-all over the dim axis carries both: to each rank its queries, and this rank's slice of all keys
    and values. Its backward returns each rank's partial key and value gradients to the owner of the slice, which
    adds them.
    """

    rule = SequenceRule()
    separates = True
    cache: TokenCache | None = None
    """What also has to be filled by this pass, which is a prompt."""

    def with_cache(self, context: Any, layer: int, shape: AttentionShape) -> Exchange:
        """A prompt that has the chunks fills the cache on its way; every other pass goes to the cache."""
        cache = TokenCache(context, layer, self.n, self.j, shape.s, shape.b)
        if shape.behind_cache or shape.s % (2 * self.n):
            return SpreadTokens(self.rule, self.groups, self.layout, cache)
        prompt = copy.copy(self)
        prompt.cache = cache
        return prompt

    def stock_cache(self, context: Any, layer: int, key: Tensor) -> None:
        """Nothing for stock to cache: `attend` does."""
        return None

    def to_heads(self, mixed: Tensor) -> QKV:
        """[s, b, slots · d/n] -> queries (and gates) [s/n, b, h/m, d], keys and values [s, b, g/m, d]."""
        s, b, _ = mixed.shape
        layout, n = self.layout, self.n
        slots = mixed.view(s, b, layout.kv_groups, layout.query_slots + 2, layout.width)
        queries, keys_values = slots.split([layout.query_slots, 2], dim=3)
        # [s, b, ..] -> [n, s/n · b · ..]: for each rank of the dim group its early and its late chunk
        chunks = spread(queries, n).flatten(1)
        everyone = keys_values.reshape(1, -1).expand(n, -1)
        traded = all_to_all(self.groups.dim, torch.cat((chunks, everyone), dim=1))
        own, whole = traded.split([chunks.shape[1], everyone.shape[1]], dim=1)
        # [n, s/n, b, g/m, slots, d/n] -> [s/n, b, g/m, slots, d], and the same for the s keys and values
        own = own.view(n, s // n, b, layout.kv_groups, layout.query_slots, layout.width)
        own = own.permute(1, 2, 3, 4, 0, 5).flatten(4)
        whole = whole.view(n, s, b, layout.kv_groups, 2, layout.width).permute(1, 2, 3, 4, 0, 5).flatten(4)
        query, gate = own[:, :, :, : layout.queries], own[:, :, :, layout.queries :]
        key, value = whole.unbind(dim=3)
        return QKV(query.flatten(2, 3), gate.flatten(2, 3) if layout.gate else None, key, value)

    def to_slices(self, context: Tensor) -> Tensor:
        """[s/n, b, h/m · d] -> [s, b, h/m · d/n]."""
        share, b, _ = context.shape
        blocks = context.view(share, b, self.layout.heads, self.n, self.layout.width).permute(3, 0, 1, 2, 4)
        traded = all_to_all(self.groups.dim, blocks.contiguous())
        # [n, s/n, b, h/m, d/n] -> [s, b, h/m · d/n]: the chunks back into the order of the sequence
        return in_order(traded.view(self.n, share, b, -1))

    def split_angles(self, angles: Angles, config: TransformerConfig) -> tuple[Angles, Angles]:
        """Queries rotate by their own positions, keys by all."""
        query, key = angles if self.cache is None else (a if a is None else self.cache.of_pass(a) for a in angles)
        return (None if query is None else own_tokens(query, self.j, self.n), key), (None, None)

    def attends(self, query: Tensor, key: Tensor, caching: bool) -> bool:
        """Fewer queries than keys."""
        return query.shape[0] != key.shape[0]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, how: CoreSettings) -> Tensor:
        """This rank's queries against all keys; as many of both are all there is."""
        chunks = chunks_of(self.j, self.n) if query.shape[0] != key.shape[0] else (0,)
        if self.cache is not None:
            self.cache.keep(self.cache.own(key), self.cache.own(value))
        # Never inside itself: recompute enters only the inner fork, from where the outer one began.
        with get_cuda_rng_tracker().fork() if how.dropout and not how.own_stream else nullcontext():
            return sequence_attention(
                query,
                key,
                value,
                chunks=chunks,
                mask=mask,
                causal=how.causal,
                window=how.window,
                scale=how.scale,
                dropout=how.dropout,
            )
