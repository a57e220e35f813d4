"""What `local` needs, moves and keeps."""

from __future__ import annotations

from hp_plugin.exchange.rule import ExchangeRule
from hp_plugin.exchange.sizes import AttentionShape, Cached, Inner


class LocalRule(ExchangeRule):
    """Every slice runs its own softmax: attention with h·n heads of d/n, another function."""

    name = "local"
    exact = False

    def missing(self, shape: AttentionShape) -> str | None:
        width = shape.d // shape.n
        if shape.rotary and width % 2:
            return f"needs an even slice for rotary embeddings: d/n = {shape.d}/{shape.n} = {width}"
        if shape.rotary % shape.n or (shape.rotary // shape.n) % 2:
            return (
                f"needs the rotated channels to split evenly over the slices: {shape.rotary} rotated channels "
                f"over n = {shape.n} slices"
            )
        return None

    def inner(self, shape: AttentionShape) -> Inner:
        return Inner(shape.b, shape.s, shape.d // shape.n)

    def cached(self, shape: AttentionShape) -> Cached:
        return Cached(shape.b, shape.cache, shape.d // shape.n)
