"""What `scores` needs, moves and keeps."""

from __future__ import annotations

from hp_plugin.exchange.rule import AttentionShape, ExchangeRule

SCORES_BLOCK = 256
"""Queries per block of the `scores` exchange (its only tuning knob; see `ScoresRule.elements`)."""


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
