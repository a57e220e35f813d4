"""What an exchange needs of a model's shape, what it moves and keeps; no torch."""

from __future__ import annotations

from dataclasses import dataclass

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
    def slice_size(self) -> int:
        """Elements of one slot on one rank before any exchange: s · b · d/n."""
        return self.s * self.b * (self.d // self.n)


class ExchangeRule:
    """The contract of one exchange strategy: what it moves in the dim group, how much, and what it needs."""

    name: str
    moves: str
    exact = True
    stock_core = True
    """Whether stock's inner attention serves it, with all it can do: biases, offsets, context parallelism."""
    caches = True
    """Whether stock's key/value cache of static batches works beside it."""

    def missing(self, shape: AttentionShape) -> str | None:
        """Says why this exchange cannot carry `shape`, or None."""
        return None

    def refusal(self, shape: AttentionShape) -> Refusal | None:
        """Why this exchange cannot carry `shape` and what is asked for beside it, or None."""
        if shape.stock_core_alone and not self.stock_core:
            return Refusal("feature", f"`{self.name}` cannot {' or '.join(shape.stock_core_alone)}")
        missing = self.missing(shape)
        return None if missing is None else Refusal("shape", f"`{self.name}` {missing}")

    def elements(self, shape: AttentionShape) -> int:
        """Elements one rank receives from its dim group in one layer's forward pass."""
        raise NotImplementedError

    def elements_backward(self, shape: AttentionShape) -> int:
        """The same for the backward pass, recomputation of activations excluded."""
        return self.elements(shape)

    def bytes(self, shape: AttentionShape, itemsize: int) -> int:
        """Bytes one rank receives in one layer's forward pass; `itemsize` in bytes."""
        return self.elements(shape) * itemsize
