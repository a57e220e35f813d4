"""What `sequence` needs, moves and keeps."""

from __future__ import annotations

from hp_plugin.exchange.rule import AttentionShape, ExchangeRule


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

    def elements(self, shape: AttentionShape) -> int:
        traded = (shape.n - 1) * (shape.query_slots + shape.h // shape.m) * shape.slice_size // shape.n
        return traded + (shape.n - 1) * 2 * (shape.g // shape.m) * shape.slice_size
