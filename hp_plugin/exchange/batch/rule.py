"""What `batch` needs, moves and keeps."""

from __future__ import annotations

from hp_plugin.exchange.rule import AttentionShape, ExchangeRule


class BatchRule(ExchangeRule):
    """Trade slices of the whole micro-batch for full heads of a b/n share, and back."""

    name = "batch"
    moves = "all-to-all of q, k, v slices against full heads of b/n samples; the output back"

    def missing(self, shape: AttentionShape) -> str | None:
        if shape.b % shape.n:
            return f"needs a micro-batch size divisible by n: {shape.b} % {shape.n} = {shape.b % shape.n}"
        return None

    def elements(self, shape: AttentionShape) -> int:
        slots = shape.query_slots + 2 * (shape.g // shape.m) + shape.h // shape.m
        return (shape.n - 1) * slots * shape.slice_size // shape.n
