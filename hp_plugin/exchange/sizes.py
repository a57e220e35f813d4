"""The sizes that exchanges count by: of attention on one rank, of a block of layers, of a cache; no torch."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd


@dataclass(frozen=True)
class AttentionShape:
    """One attention layer on an m × n grid, in DESIGN's letters; `s` counts the whole sequence.

    Args:
        rotary: rotated channels per head (0: no rotary embedding).
        stock_core_alone: what is asked for that only stock's inner attention does, each after "cannot": "do flash
            decoding".
        cache: tokens of each sequence whose keys and values lie in a cache when the pass attends, its own s among them;
            0: there is none. A decode step has s = 1.
    """

    s: int
    b: int
    h: int
    g: int
    d: int
    m: int
    n: int
    causal: bool = True
    gate: bool = False
    rotary: int = 0
    rotary_interleaved: bool = False
    qk_norm: str | None = None
    stock_core_alone: tuple[str, ...] = ()
    cache: int = 0

    @property
    def decodes(self) -> bool:
        """Whether the pass is one token of each sequence against a cache."""
        return self.cache > 0 and self.s == 1

    @property
    def behind_cache(self) -> bool:
        """Whether the pass attends to tokens of earlier passes, too."""
        return self.cache > self.s

    @property
    def query_slots(self) -> int:
        """Head slots that belong to queries on one rank: its query heads, and as many gates if there are gates."""
        return self.h // self.m * (2 if self.gate else 1)

    @property
    def key_value_slots(self) -> int:
        """Head slots of one rank's keys and values together."""
        return 2 * (self.g // self.m)

    @property
    def output_slots(self) -> int:
        """Head slots of one rank's attention output."""
        return self.h // self.m

    @property
    def slice_size(self) -> int:
        """Elements of one slot on one rank before any exchange: s · b · d/n."""
        return self.s * self.b * (self.d // self.n)


@dataclass(frozen=True)
class BlockShape:
    """The layers that one micro-batch passes, in one or more (virtual) pipeline stages, around this attention.

    Args:
        attention: each layer's, of the whole micro-batch.
        D: hidden size.
        width: of a dense layer's MLP. gated: three matrices in place of two.
        dense, moe: layers with an MLP and with a mixture of experts, which lies still whatever else moves.
        whole_tokens: whether mixtures take what stock's ranks hold, as DeepSpeed's do, instead of a share of it.
        sequence_parallel: Megatron's.
        qkv_bias, mlp_bias: whether the column-parallel linears have biases.
        recompute: whether backward repeats whole forward passes.
        blocks: how many stages the layers are divided into, or what else takes and returns whole micro-batches.
        vocabulary: rows of the embedding and of the output layer. embedding_shared, output_shared: whether they are
            among these layers' work where weights move, on a share of the tokens.
    """

    attention: AttentionShape
    D: int
    width: int
    dense: int
    moe: int = 0
    gated: bool = False
    whole_tokens: bool = False
    sequence_parallel: bool = False
    qkv_bias: bool = False
    mlp_bias: bool = False
    recompute: bool = False
    blocks: int = 1
    vocabulary: int = 0
    embedding_shared: bool = False
    output_shared: bool = False

    @property
    def layers(self) -> int:
        """Of both kinds."""
        return self.dense + self.moe

    @property
    def hidden(self) -> int:
        """Elements of the micro-batch's hidden states, s · b · D."""
        return self.attention.s * self.attention.b * self.D

    @property
    def weights(self) -> int:
        """Elements of all weights of the layers' linears, W of a layer: experts are none of them."""
        shape = self.attention
        queries = shape.h * (2 if shape.gate else 1)
        attention = (queries + 2 * shape.g + shape.h) * shape.d
        return self.D * (self.layers * attention + self.dense * (3 if self.gated else 2) * self.width)

    @property
    def biases(self) -> int:
        """Elements of the biases of column-parallel linears, which are sharded as their weights are."""
        shape = self.attention
        rows = (shape.h * (2 if shape.gate else 1) + 2 * shape.g) * shape.d
        inner = (2 if self.gated else 1) * self.width
        return self.layers * rows * self.qkv_bias + self.dense * inner * self.mlp_bias

    def sums(self, training: bool) -> int:
        """How often the layers send one micro-batch's hidden states around their tensor-parallel ranks, one way.

        Every pair of linears gathers or sums once before and once behind it, an all-reduce being both; backward does
        the same, and gathers once more under sequence parallelism (`megatron.core.tensor_parallel.layers`).
        """
        pairs = 2 * self.dense + self.moe
        forward = 2 * pairs
        if not training:
            return forward
        return forward + (3 if self.sequence_parallel else 2) * pairs + (forward if self.recompute else 0)


@dataclass(frozen=True)
class Inner:
    """What one rank's inner attention works on: whole or sliced heads, `channels` wide, of `samples` samples with
    `queries` rows each."""

    samples: int
    queries: int
    channels: int


@dataclass(frozen=True)
class Cached:
    """What one rank caches in a layer: keys and values of its key/value heads, `channels` wide, of `tokens` tokens of
    each of `samples` sequences; on the rank that has most."""

    samples: int
    tokens: int
    channels: int

    def elements(self, kv_heads: int) -> int:
        """Keys and values together."""
        return 2 * self.samples * self.tokens * kv_heads * self.channels


CACHE_BLOCK = 16
"""Tokens of a sequence that one rank caches before the next rank's turn: what Helix has (arXiv:2507.07120, 2.3)."""


def cache_block(tokens: int, n: int) -> int:
    """Tokens of a block where n ranks share a cache of so many: as many as CACHE_BLOCK if that makes equal parts."""
    return gcd(tokens // n, CACHE_BLOCK) if tokens % n == 0 else 1


def cached_by_tokens(shape: AttentionShape) -> Cached:
    """What a rank has of a cache where whole heads of every n-th block of tokens are one rank's (`cache_block`)."""
    return Cached(shape.b, -(-shape.cache // shape.n), shape.d)
