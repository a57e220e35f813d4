"""`scores`: slices stay where they are; partial scores are summed inside the attention."""

from __future__ import annotations

import torch
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
    _yarn_get_concentration_factor_from_config,
)
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from hp_plugin.exchange.dropout_rng import HEAD_PARALLEL_RNG, ensure_rng
from hp_plugin.exchange.scores.attention import ScoresSettings, scores_attention
from hp_plugin.exchange.scores.rule import ScoresRule
from hp_plugin.exchange.scores.slice_norm import normed_slices
from hp_plugin.exchange.scores.slice_rotary import rotate_slices
from hp_plugin.exchange.strategy import QKV, Angles, CoreSettings, Exchange


class ScoresExchange(Exchange):
    """Every rank keeps its d/n slice; `attention` beside this all-reduces partial scores over the dim axis.

    Moves nothing around the attention itself: rotary halves, norm statistics and scores travel inside it.
    """

    rule = ScoresRule()
    separates = True

    def to_heads(self, mixed: Tensor) -> QKV:
        """[s, b, slots · d/n] -> queries (and gates) [s, b, h/m, d/n], keys and values [s, b, g/m, d/n]."""
        s, b, _ = mixed.shape
        layout = self.layout
        slots = mixed.view(s, b, layout.kv_groups, layout.query_slots + 2, layout.width)
        gates = layout.query_slots - layout.queries
        query, gate, key, value = slots.split([layout.queries, gates, 1, 1], dim=3)
        return QKV(query.flatten(2, 3), gate.flatten(2, 3) if layout.gate else None, key.squeeze(3), value.squeeze(3))

    def to_slices(self, context: Tensor) -> Tensor:
        """The attention output is this rank's slice already."""
        return context

    def split_angles(self, angles: Angles, config: TransformerConfig) -> tuple[Angles, Angles]:
        """Slices rotate with their partners' help, in `rotated`; stock must not rotate again."""
        return (None, None), angles

    def normed(self, norm: nn.Module, states: Tensor) -> Tensor:
        """The statistics of whole heads, summed over the dim axis."""
        return normed_slices(norm, states, self.groups.dim)

    def rotated(self, query: Tensor, key: Tensor, angles: Angles, config: TransformerConfig) -> tuple[Tensor, Tensor]:
        """Each channel with its pair partner, which may live on another rank of the dim axis."""
        return rotate_slices(
            query,
            key,
            angles,
            group=self.groups.dim,
            interleaved=config.rotary_interleaved,
            mscale=_yarn_get_concentration_factor_from_config(config),
        )

    def attends(self, query: Tensor, key: Tensor, caching: bool) -> bool:
        """Slices of heads."""
        return query.shape[-1] == self.layout.width

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, how: CoreSettings) -> Tensor:
        """Partial scores, summed over the dim axis; the n ranks drop the same ones."""

        def run(rng_state: Tensor | None) -> Tensor:
            settings = ScoresSettings(self.groups.dim, how.causal, how.window, how.scale, how.dropout, rng_state)
            return scores_attention(query, key, value, mask, settings)

        if not how.dropout:
            return run(None)
        ensure_rng(HEAD_PARALLEL_RNG, self.groups.dim)
        with get_cuda_rng_tracker().fork(HEAD_PARALLEL_RNG):
            return run(torch.cuda.get_rng_state(query.device) if query.is_cuda else torch.get_rng_state())
