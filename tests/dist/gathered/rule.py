"""What `gathered` needs, moves and keeps."""

from __future__ import annotations

from hp_plugin.exchange.rule import ExchangeRule
from hp_plugin.exchange.sizes import AttentionShape


class GatheredRule(ExchangeRule):
    """Gather the others' slices and attend to everything; nothing to send back."""

    name = "gathered"
    moves = "all-gather of q, k, v slices; each rank keeps its slice of the output"

    def traded_in(self, shape: AttentionShape) -> int:
        # To gather is to send the same to each of the n ranks.
        return shape.n * (shape.query_slots + shape.key_value_slots) * shape.slice_size
