"""`scores`: slices stay where they are; partial scores are summed inside the attention."""

from __future__ import annotations

from torch import Tensor

from hp_plugin.exchange.base import QKV, Exchange


class ScoresExchange(Exchange):
    """Every rank keeps its d/n slice; `hp_plugin.inner_attention.scores` all-reduces partial scores over the dim axis.

    Moves nothing around the attention itself: rotary halves, norm statistics and scores travel inside it.
    """

    name = "scores"

    def to_heads(self, mixed: Tensor) -> QKV:
        """[s, b, slots · d/n] -> queries (and gates) [s, b, h/m, d/n], keys and values [s, b, g/m, d/n]."""
        s, b, _ = mixed.shape
        layout = self.layout
        slots = mixed.view(s, b, layout.groups, layout.query_slots + 2, layout.width)
        gates = layout.query_slots - layout.queries
        query, gate, key, value = slots.split([layout.queries, gates, 1, 1], dim=3)
        return QKV(query.flatten(2, 3), gate.flatten(2, 3) if layout.gate else None, key.squeeze(3), value.squeeze(3))

    def to_slices(self, context: Tensor) -> Tensor:
        """The attention output is this rank's slice already."""
        return context
