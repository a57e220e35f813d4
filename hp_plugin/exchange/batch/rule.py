"""What `batch` needs, moves and keeps."""

from __future__ import annotations

from hp_plugin.exchange.rule import ExchangeRule
from hp_plugin.exchange.sizes import AttentionShape, Cached, Inner


class BatchRule(ExchangeRule):
    """Trade slices of the whole micro-batch for full heads of a b/n share, and back."""

    name = "batch"
    moves = "all-to-all of q, k, v slices against full heads of b/n samples; the output back"

    def missing(self, shape: AttentionShape) -> str | None:
        if shape.b % shape.n:
            return f"needs a micro-batch size divisible by n: {shape.b} % {shape.n} = {shape.b % shape.n}"
        return None

    def inner(self, shape: AttentionShape) -> Inner:
        return Inner(shape.b // shape.n, shape.s, shape.d)

    def cached(self, shape: AttentionShape) -> Cached:
        return Cached(shape.b // shape.n, shape.cache, shape.d)

    def traded_in(self, shape: AttentionShape) -> int:
        return (shape.query_slots + shape.key_value_slots) * shape.slice_size

    def traded_out(self, shape: AttentionShape) -> int:
        return shape.output_slots * shape.slice_size

    def kept(self, shape: AttentionShape) -> int:
        # The projection keeps its input, which the trade made beside the output that attention keeps.
        return self.traded_out(shape)
