"""What `gathered` needs, moves and keeps."""

from __future__ import annotations

from hp_plugin.exchange.rule import AttentionShape, ExchangeRule


class GatheredRule(ExchangeRule):
    """Gather the others' slices and attend to everything; nothing to send back."""

    name = "gathered"
    moves = "all-gather of q, k, v slices; each rank keeps its slice of the output"

    def elements(self, shape: AttentionShape) -> int:
        return (shape.n - 1) * (shape.query_slots + 2 * shape.g // shape.m) * shape.slice_size
