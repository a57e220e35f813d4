"""What an exchange needs of a model's shape, what it moves and keeps; no torch."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Any

from hp_plugin.refusal import Refusal


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


class ExchangeRule:
    """The facts of one exchange strategy, counted per rank and layer; as they stand here, of one that moves nothing.

    What is traded goes through all-to-alls of the dim group and is counted as what one rank puts in, of which it keeps
    an n-th; what is received of it follows.
    """

    name: str
    moves = "nothing"
    exact = True
    stock_core = True
    """Whether stock's inner attention serves it, with all it can do: biases, offsets, context parallelism."""
    latent = False
    """Whether multi-latent attention, whose heads have no slices, runs under it."""
    moves_weights = False
    """Whether weights move instead of activations."""
    caches = True
    """Whether the key/value cache of static batches works beside it."""
    head_axis = False
    """Whether it sends anything over the head axis; otherwise only the dim axis gains by lying inside a node."""
    keeps_statistics = True
    """Whether inner attention that keeps no scores keeps an fp32 number per row (the softmax's) for backward."""

    def cannot(self, config: Any) -> tuple[str, ...]:
        """What a model's configuration asks for that it cannot do, whatever the micro-batch, each after "cannot"."""
        return ()

    def missing(self, shape: AttentionShape) -> str | None:
        """Says why this exchange cannot carry `shape`, or None."""
        return None

    def refusal(self, shape: AttentionShape) -> Refusal | None:
        """Why this exchange cannot carry `shape` and what is asked for beside it, or None."""
        if shape.cache and not self.caches:
            return Refusal("feature", f"`{self.name}` has no key/value cache")
        if shape.stock_core_alone and not self.stock_core:
            return Refusal("feature", f"`{self.name}` cannot {' or '.join(shape.stock_core_alone)}")
        missing = self.missing(shape)
        return None if missing is None else Refusal("shape", f"`{self.name}` {missing}")

    def inner(self, shape: AttentionShape) -> Inner:
        """What inner attention sees of the micro-batch."""
        return Inner(shape.b, shape.s, shape.d)

    def cached(self, shape: AttentionShape) -> Cached | None:
        """What a rank has of a cache of `shape.cache` tokens of each sequence; None: it cannot have one."""
        return Cached(shape.b, shape.cache, shape.d)

    def traded_in(self, shape: AttentionShape) -> int:
        """Elements traded before attention: queries, gates, keys and values."""
        return 0

    def traded_out(self, shape: AttentionShape) -> int:
        """Elements traded after attention: its output."""
        return 0

    def gathered(self, shape: AttentionShape) -> int:
        """Elements of keys and values, decoding of queries too, that are gathered from the dim group for attention,
        this rank's among them."""
        return 0

    def joined(self, shape: AttentionShape) -> int:
        """Elements of outputs that a rank's own part of a cache gave, which the dim group joins by their log-sum-exp.

        Each rank puts in whole heads, in the model's dtype, and gets every rank's part of its own slices.
        """
        return 0

    def join_sums(self, shape: AttentionShape) -> int:
        """fp32 numbers received beside it: every other rank's log-sum-exp of each head and token."""
        return (shape.n - 1) * shape.s * shape.b * shape.output_slots if self.joined(shape) else 0

    def moves_ends(self, shape: AttentionShape, vocabulary: int, sequence_parallel: bool) -> tuple[bool, bool]:
        """Where weights move: whether those of embedding and of output layer move, too, instead of the tokens."""
        return False, False

    def leaving(self, shape: AttentionShape, head_innermost: bool = False) -> float:
        """Where weights move under sequence parallelism: the part of a mean rank's tokens that goes to others at an end
        of a block of layers."""
        return 0.0

    def rotary_halves(self, shape: AttentionShape) -> int:
        """Elements received of rotary pairs that the slices cut apart: the partners of a rank's own channels."""
        return 0

    def norm_sums(self, shape: AttentionShape) -> int:
        """fp32 numbers per head and token that a norm of queries or keys sums over the dim group."""
        return 0

    def score_blocks(self, shape: AttentionShape) -> tuple[tuple[int, int], ...]:
        """(queries, keys) of every block of partial scores that is summed over the dim group, for each head."""
        return ()

    def kept(self, shape: AttentionShape) -> int:
        """Elements kept for backward beside this rank's slices of queries, keys, values and output."""
        return 0

    def held_bytes(self, shape: AttentionShape, itemsize: int) -> int:
        """Bytes of the exchange's buffers at their largest: what is traded, as it is sent and as it comes."""
        return 2 * self.traded_in(shape) * itemsize

    def elements(self, shape: AttentionShape) -> int:
        """Elements one rank receives from its dim group in one layer's forward pass."""
        traded = self.traded_in(shape) + self.traded_out(shape) + self.gathered(shape) + self.joined(shape)
        return (shape.n - 1) * traded // shape.n

    def elements_backward(self, shape: AttentionShape) -> int:
        """The same for the backward pass, recomputation of activations excluded."""
        return self.elements(shape)

    def bytes(self, shape: AttentionShape, itemsize: int) -> int:
        """Bytes one rank receives in one layer's forward pass; `itemsize` in bytes."""
        return self.elements(shape) * itemsize + 4 * self.join_sums(shape)

    def bytes_backward(self, shape: AttentionShape, itemsize: int) -> int:
        """The same for the backward pass."""
        return self.elements_backward(shape) * itemsize

    def pass_bytes(self, block: BlockShape, itemsize: int, training: bool) -> float:
        """Bytes one rank sends while one micro-batch passes a block, forward and, in training, backward.

        Around attention, around the linears and at the ends of the block. What no exchange changes is left out: what
        mixtures send, embedding and output, messages between stages, and what is sent once in a step.
        """
        size = block.attention.m * block.attention.n
        linears = block.sums(training) * (size - 1) / size * block.hidden * itemsize
        return linears + self._attention_bytes(block, itemsize, training)

    def _attention_bytes(self, block: BlockShape, itemsize: int, training: bool) -> float:
        shape = block.attention
        sent = self.bytes(shape, itemsize) * (2 if training and block.recompute else 1)
        return block.layers * (sent + (self.bytes_backward(shape, itemsize) if training else 0))


class StockRule(ExchangeRule):
    """Stock attention, and a grid with one slice: whole heads everywhere, nothing to exchange."""

    name = "stock"


STOCK = StockRule()
