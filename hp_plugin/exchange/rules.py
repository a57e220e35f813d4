"""What every exchange strategy needs of a model's shape, and how much it moves; no torch."""

from __future__ import annotations

from dataclasses import dataclass

SCORES_BLOCK = 256
"""Queries per block of the `scores` exchange (its only tuning knob; see `ScoresRule.elements`)."""


@dataclass(frozen=True)
class AttentionShape:
    """One attention layer on an m × n grid, in DESIGN's letters; `s` counts the whole sequence.

    `rotary` is the number of rotated channels per head (0: no rotary embedding).
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

    def elements(self, shape: AttentionShape) -> int:
        """Elements one rank receives from its dim group in one layer's forward pass."""
        raise NotImplementedError

    def elements_backward(self, shape: AttentionShape) -> int:
        """The same for the backward pass, recomputation of activations excluded."""
        return self.elements(shape)

    def bytes(self, shape: AttentionShape, itemsize: int) -> int:
        """Bytes one rank receives in one layer's forward pass; `itemsize` in bytes."""
        return self.elements(shape) * itemsize


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


class SequenceRule(ExchangeRule):
    """The same trade for s/n of the queries; keys and values are gathered whole."""

    name = "sequence"
    stock_core = caches = False
    moves = "all-to-all of q slices against full heads of s/n queries, all-gather of k and v; the output back"

    def missing(self, shape: AttentionShape) -> str | None:
        if shape.s % (2 * shape.n):
            return (
                "needs a sequence length divisible by 2n (an early and a late chunk for each of the n ranks): "
                f"{shape.s} % {2 * shape.n} = {shape.s % (2 * shape.n)}"
            )
        return None

    def elements(self, shape: AttentionShape) -> int:
        traded = (shape.n - 1) * (shape.query_slots + shape.h // shape.m) * shape.slice_size // shape.n
        return traded + (shape.n - 1) * 2 * (shape.g // shape.m) * shape.slice_size


class ScoresRule(ExchangeRule):
    """Sum the partial scores of the slices before the softmax, in blocks of queries."""

    name = "scores"
    stock_core = caches = False
    moves = "all-reduce of partial scores in query blocks; missing rotary halves; sums of squares of QK-norm"

    def missing(self, shape: AttentionShape) -> str | None:
        if shape.rotary and shape.rotary_interleaved and shape.n > 1 and (shape.d // shape.n) % 2:
            return (
                f"needs an even slice when rotary pairs are interleaved, or the slices cut pairs apart: "
                f"d/n = {shape.d}/{shape.n} = {shape.d // shape.n}"
            )
        return None

    def score_elements(self, shape: AttentionShape, block: int = SCORES_BLOCK) -> int:
        """Score elements that go into the all-reduces of one forward pass on one rank."""
        ends = [min(start + block, shape.s) for start in range(0, shape.s, block)]
        starts = [0, *ends[:-1]]
        keys = [end if shape.causal else shape.s for end in ends]
        area = sum((end - start) * k for start, end, k in zip(starts, ends, keys, strict=True))
        return shape.b * (shape.h // shape.m) * area

    def _reduced(self, shape: AttentionShape, elements: int) -> int:
        # A ring all-reduce receives every element of a share twice, 2 (n-1)/n of the buffer.
        return 2 * (shape.n - 1) * elements // shape.n

    def _prologue(self, shape: AttentionShape) -> tuple[int, int]:
        """Elements of (rotary halves received, norm statistics to reduce)."""
        heads = shape.h // shape.m + shape.g // shape.m
        halves = 0
        if shape.n > 1 and shape.rotary and not shape.rotary_interleaved:
            width, half = shape.d // shape.n, shape.rotary // 2
            foreign = 0
            for channel in range(shape.rotary):
                partner = channel + half if channel < half else channel - half
                foreign += channel // width != partner // width
            # Received by all n ranks together; each rank's own share differs when rotary < d.
            halves = shape.s * shape.b * heads * foreign // shape.n
        statistics = {None: 0, "L2Norm": 1, "RMSNorm": 1, "LayerNorm": 2}[shape.qk_norm]
        return halves, statistics * shape.s * shape.b * heads

    def elements(self, shape: AttentionShape, block: int = SCORES_BLOCK) -> int:
        halves, statistics = self._prologue(shape)
        return halves + self._reduced(shape, statistics + self.score_elements(shape, block))

    def bytes(self, shape: AttentionShape, itemsize: int) -> int:
        statistics = self._reduced(shape, self._prologue(shape)[1])
        return (self.elements(shape) - statistics) * itemsize + statistics * 4  # statistics travel in fp32

    def elements_backward(self, shape: AttentionShape, block: int = SCORES_BLOCK) -> int:
        # Probabilities are not kept (at most one block of scores exists at a time), so backward reduces
        # the recomputed scores and the partial gradients of the probabilities.
        halves, statistics = self._prologue(shape)
        return halves + self._reduced(shape, statistics + 2 * self.score_elements(shape, block))


class LocalRule(ExchangeRule):
    """Every slice runs its own softmax: attention with h·n heads of d/n, another function."""

    name = "local"
    moves = "nothing"
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

    def elements(self, shape: AttentionShape) -> int:
        return 0


RULES: dict[str, ExchangeRule] = {rule.name: rule for rule in (BatchRule(), SequenceRule(), ScoresRule(), LocalRule())}
AUTO_ORDER = ("batch", "sequence", "scores")
"""What `auto` tries, cheapest first."""

EXCHANGES = (*RULES, "auto")


def resolve(exchange: str, shape: AttentionShape) -> str:
    """The exchange that `exchange` stands for at this shape; raises ValueError if it cannot carry it."""
    candidates = AUTO_ORDER if exchange == "auto" else (exchange,)
    reasons = {name: RULES[name].missing(shape) for name in candidates}
    for name, reason in reasons.items():
        if reason is None:
            return name
    fitting = [name for name in AUTO_ORDER if RULES[name].missing(shape) is None]
    way_out = f"; --head-dim-exchange {' or '.join(fitting)} can" if fitting else ""
    said = "; ".join(f"`{name}` {reason}" for name, reason in reasons.items())
    raise ValueError(f"exchange {said}{way_out}")
