"""What an exchange needs of a model's shape, what it moves and keeps; no torch."""

from __future__ import annotations

from typing import Any

from hp_plugin.exchange.sizes import AttentionShape, BlockShape, Cached, Inner
from hp_plugin.refusal import Refusal


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
