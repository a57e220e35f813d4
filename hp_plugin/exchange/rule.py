"""What an exchange needs of a model's shape, what it moves and keeps; no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hp_plugin.refusal import Refusal


@dataclass(frozen=True)
class AttentionShape:
    """One attention layer on an m × n grid, in DESIGN's letters; `s` counts the whole sequence.

    Args:
        rotary: rotated channels per head (0: no rotary embedding).
        stock_core_alone: what is asked for that only stock's inner attention does, each after "cannot": "do flash
            decoding".
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
class Inner:
    """What one rank's inner attention works on: whole or sliced heads, `channels` wide, of `samples` samples with
    `queries` rows each."""

    samples: int
    queries: int
    channels: int


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
    moves_weights = False
    """Whether weights move instead of activations."""
    caches = True
    """Whether stock's key/value cache of static batches works beside it."""
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
        if shape.stock_core_alone and not self.stock_core:
            return Refusal("feature", f"`{self.name}` cannot {' or '.join(shape.stock_core_alone)}")
        missing = self.missing(shape)
        return None if missing is None else Refusal("shape", f"`{self.name}` {missing}")

    def inner(self, shape: AttentionShape) -> Inner:
        """What inner attention sees of the micro-batch."""
        return Inner(shape.b, shape.s, shape.d)

    def traded_in(self, shape: AttentionShape) -> int:
        """Elements traded before attention: queries, gates, keys and values."""
        return 0

    def traded_out(self, shape: AttentionShape) -> int:
        """Elements traded after attention: its output."""
        return 0

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
        return (shape.n - 1) * (self.traded_in(shape) + self.traded_out(shape)) // shape.n

    def elements_backward(self, shape: AttentionShape) -> int:
        """The same for the backward pass, recomputation of activations excluded."""
        return self.elements(shape)

    def bytes(self, shape: AttentionShape, itemsize: int) -> int:
        """Bytes one rank receives in one layer's forward pass; `itemsize` in bytes."""
        return self.elements(shape) * itemsize


class StockRule(ExchangeRule):
    """Stock attention, and a grid with one slice: whole heads everywhere, nothing to exchange."""

    name = "stock"


STOCK = StockRule()
