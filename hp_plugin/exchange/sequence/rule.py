"""What `sequence` needs, moves and keeps."""

from __future__ import annotations

from hp_plugin.exchange.rule import AttentionShape, Cached, ExchangeRule, Inner

CACHE_BLOCK = 16
"""Tokens of a sequence that one rank caches before the next rank's turn: what Helix has (arXiv:2507.07120, 2.3)."""


class SequenceRule(ExchangeRule):
    """The same trade for s/n of the queries; keys and values are gathered whole.

    Of a cache each rank has whole heads of every n-th block of tokens; a decoded token's query goes to all of them, and
    their outputs are joined by their log-sum-exp.
    """

    name = "sequence"
    stock_core = caches = False
    moves = "all-to-all of q slices against full heads of s/n queries, all-gather of k and v; the output back"

    def missing(self, shape: AttentionShape) -> str | None:
        if not shape.decodes and shape.s % (2 * shape.n):
            return (
                "needs a sequence length divisible by 2n (an early and a late chunk for each of the n ranks): "
                f"{shape.s} % {2 * shape.n} = {shape.s % (2 * shape.n)}"
            )
        return None

    def inner(self, shape: AttentionShape) -> Inner:
        return Inner(shape.b, 1 if shape.decodes else shape.s // shape.n, shape.d)

    def cached(self, shape: AttentionShape) -> Cached:
        turns, rest = divmod(shape.cache, CACHE_BLOCK * shape.n)
        return Cached(shape.b, turns * CACHE_BLOCK + min(rest, CACHE_BLOCK), shape.d)

    def traded_in(self, shape: AttentionShape) -> int:
        if shape.decodes:
            return 0
        # Every rank of the dim group gets its own queries and, beside them, this rank's slice of all keys and values.
        return (shape.query_slots + shape.n * shape.key_value_slots) * shape.slice_size

    def traded_out(self, shape: AttentionShape) -> int:
        return 0 if shape.decodes else shape.output_slots * shape.slice_size

    def gathered(self, shape: AttentionShape) -> int:
        # Every rank has a part of the cache and so a use for each query; the new key and value are one rank's to cache.
        return (shape.query_slots + shape.key_value_slots) * shape.n * shape.slice_size if shape.decodes else 0

    def joined(self, shape: AttentionShape) -> int:
        return shape.output_slots * shape.n * shape.slice_size if shape.decodes else 0

    def kept(self, shape: AttentionShape) -> int:
        # Other ranks' slices of keys and values; and the projection's input, beside the output that attention keeps.
        return (shape.n - 1) * shape.key_value_slots * shape.slice_size + self.traded_out(shape)
