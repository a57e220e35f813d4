"""How servers, when they decode, spread the cache of ranks that would hold the same key/value heads.

Counted as exchanges are: m ranks split heads, n = TP/m share their cache.
"""

from __future__ import annotations

from hp_plugin.exchange.rule import ExchangeRule
from hp_plugin.exchange.sizes import AttentionShape, Cached, Inner
from hp_plugin.planner.inputs.layout import Layout


class CacheByTokens(ExchangeRule):
    """Ranks that have whole heads of every n-th token, and join outputs by their log-sum-exp."""

    def cached(self, shape: AttentionShape) -> Cached:
        return Cached(shape.b, -(-shape.cache // shape.n), shape.d)

    def joined(self, shape: AttentionShape) -> int:
        return shape.output_slots * shape.n * shape.slice_size


class DecodeContext(CacheByTokens):
    """Decode context parallelism: a rank has its own query heads, and gathers those of the others.

    Source: vLLM, docs/serving/context_parallel_deployment.md and `vllm/v1/attention/ops/common.py`.
    """

    name = "dcp"

    def gathered(self, shape: AttentionShape) -> int:
        return shape.query_slots * shape.n * shape.slice_size


class Helix(CacheByTokens):
    """Every rank makes the queries of all that share its cache (arXiv:2507.07120, section 2.1)."""

    name = "kvp"


class AttentionData(ExchangeRule):
    """Attention data parallelism: attention of b/n samples on weights of m ranks; the MLP is split over all.

    Source: SGLang, `--enable-dp-attention`.
    """

    name = "adp"

    def missing(self, shape: AttentionShape) -> str | None:
        return f"needs a micro-batch divisible by {shape.n}: {shape.b}" if shape.b % shape.n else None

    def inner(self, shape: AttentionShape) -> Inner:
        return Inner(shape.b // shape.n, shape.s, shape.d)

    def cached(self, shape: AttentionShape) -> Cached:
        return Cached(shape.b // shape.n, shape.cache, shape.d)


_DECODE_CONTEXT, _HELIX, _ATTENTION_DATA = DecodeContext(), Helix(), AttentionData()


def served_rule(layout: Layout) -> ExchangeRule | None:
    """The rule of a layout that shares caches in a server's way; None for any other."""
    if layout.dcp > 1:
        return _DECODE_CONTEXT
    if layout.kvp > 1:
        return _HELIX
    return _ATTENTION_DATA if layout.adp > 1 else None
