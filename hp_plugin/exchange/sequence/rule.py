"""What `sequence` needs, moves and keeps."""

from __future__ import annotations

from hp_plugin.exchange.rule import AttentionShape, ExchangeRule, Inner


class SequenceRule(ExchangeRule):
    """The same trade for s/n of the queries; keys and values are gathered whole."""

    name = "sequence"
    stock_core = caches = False
    moves = "all-to-all of q slices against full heads of s/n queries, all-gather of k and v; the output back"

    def missing(self, shape: AttentionShape) -> str | None:
        if shape.s % (2 * shape.n):
            return (
                "needs a sequence length divisible by 2n (an early and a late chunk for each of the n ranks): "
                f"{shape.s} % {2 * shape.n} = {shape.s % (2 * shape.n)}"
            )
        return None

    def inner(self, shape: AttentionShape) -> Inner:
        return Inner(shape.b, shape.s // shape.n, shape.d)

    def traded_in(self, shape: AttentionShape) -> int:
        # Every rank of the dim group gets its own queries and, beside them, this rank's slice of all keys and values.
        return (shape.query_slots + shape.n * shape.key_value_slots) * shape.slice_size

    def traded_out(self, shape: AttentionShape) -> int:
        return shape.output_slots * shape.slice_size

    def kept(self, shape: AttentionShape) -> int:
        # Other ranks' slices of keys and values; and the projection's input, beside the output that attention keeps.
        return (shape.n - 1) * shape.key_value_slots * shape.slice_size + self.traded_out(shape)
