"""What `sequence` needs, moves and keeps."""

from __future__ import annotations

from hp_plugin.exchange.rule import ExchangeRule
from hp_plugin.exchange.sizes import AttentionShape, Cached, Inner, cached_by_tokens


class SequenceRule(ExchangeRule):
    """The same trade for s/n of the queries; keys and values are gathered whole.

    Of a cache each rank has whole heads of every n-th block of tokens. A prompt is attended to as without one if it has
    the chunks; every other pass goes to the cache: its queries to all ranks, whose outputs are joined by their
    log-sum-exp.
    """

    name = "sequence"
    stock_core = False
    moves = "all-to-all of q slices against full heads of s/n queries, all-gather of k and v; the output back"

    def missing(self, shape: AttentionShape) -> str | None:
        if not shape.cache and shape.s % (2 * shape.n):
            return (
                "needs a sequence length divisible by 2n (an early and a late chunk for each of the n ranks): "
                f"{shape.s} % {2 * shape.n} = {shape.s % (2 * shape.n)}"
            )
        return None

    def inner(self, shape: AttentionShape) -> Inner:
        return Inner(shape.b, shape.s if self._asks_all(shape) else shape.s // shape.n, shape.d)

    def cached(self, shape: AttentionShape) -> Cached:
        return cached_by_tokens(shape)

    def traded_in(self, shape: AttentionShape) -> int:
        if self._asks_all(shape):
            return 0
        # Every rank of the dim group gets its own queries and, beside them, this rank's slice of all keys and values.
        return (shape.query_slots + shape.n * shape.key_value_slots) * shape.slice_size

    def traded_out(self, shape: AttentionShape) -> int:
        return 0 if self._asks_all(shape) else shape.output_slots * shape.slice_size

    def gathered(self, shape: AttentionShape) -> int:
        # Every rank has a part of the cache and so a use for each query; the new key and value are one rank's to cache.
        # Gates are wanted where the outputs come back, as slices.
        slots = shape.output_slots + shape.key_value_slots
        return slots * shape.n * shape.slice_size if self._asks_all(shape) else 0

    def joined(self, shape: AttentionShape) -> int:
        return shape.output_slots * shape.n * shape.slice_size if self._asks_all(shape) else 0

    @staticmethod
    def _asks_all(shape: AttentionShape) -> bool:
        """Whether all ranks of the dim group attend with all queries, each to the tokens that it caches."""
        return shape.behind_cache or bool(shape.cache and shape.s % (2 * shape.n))

    def kept(self, shape: AttentionShape) -> int:
        # Other ranks' slices of keys and values; and the projection's input, beside the output that attention keeps.
        return (shape.n - 1) * shape.key_value_slots * shape.slice_size + self.traded_out(shape)
