"""What `scores` needs, moves and keeps."""

from __future__ import annotations

from hp_plugin.exchange.rule import ExchangeRule
from hp_plugin.exchange.sizes import AttentionShape, Inner

SCORES_BLOCK = 256
"""Queries per block of the `scores` exchange (its only tuning knob; see `ScoresRule.elements`)."""


class ScoresRule(ExchangeRule):
    """Sum the partial scores of the slices before the softmax, in blocks of queries."""

    name = "scores"
    stock_core = caches = keeps_statistics = False
    moves = "all-reduce of partial scores in query blocks; missing rotary halves; sums of squares of QK-norm"

    def missing(self, shape: AttentionShape) -> str | None:
        if shape.rotary and shape.rotary_interleaved and shape.n > 1 and (shape.d // shape.n) % 2:
            return (
                f"needs an even slice when rotary pairs are interleaved, or the slices cut pairs apart: "
                f"d/n = {shape.d}/{shape.n} = {shape.d // shape.n}"
            )
        return None

    def inner(self, shape: AttentionShape) -> Inner:
        return Inner(shape.b, shape.s, shape.d // shape.n)

    def cached(self, shape: AttentionShape) -> None:
        return None

    def rotary_halves(self, shape: AttentionShape) -> int:
        if shape.n == 1 or shape.rotary_interleaved:
            return 0
        width, half = shape.d // shape.n, shape.rotary // 2
        foreign = 0
        for channel in range(shape.rotary):
            partner = channel + half if channel < half else channel - half
            foreign += channel // width != partner // width
        # Received by all n ranks together; each rank's own share differs when rotary < d.
        return shape.s * shape.b * _heads(shape) * foreign // shape.n

    def norm_sums(self, shape: AttentionShape) -> int:
        # LayerNorm sums for the mean, then for the variance; the others sum squares alone.
        return {None: 0, "L2Norm": 1, "RMSNorm": 1, "LayerNorm": 2}[shape.qk_norm]

    def score_blocks(self, shape: AttentionShape, block: int = SCORES_BLOCK) -> tuple[tuple[int, int], ...]:
        starts = range(0, shape.s, block)
        ends = [min(start + block, shape.s) for start in starts]
        return tuple((end - start, end if shape.causal else shape.s) for start, end in zip(starts, ends, strict=True))

    def score_elements(self, shape: AttentionShape, block: int = SCORES_BLOCK) -> int:
        """Score elements that go into the all-reduces of one forward pass on one rank."""
        return shape.b * shape.output_slots * sum(rows * keys for rows, keys in self.score_blocks(shape, block))

    def held_bytes(self, shape: AttentionShape, itemsize: int) -> int:
        # Backward has most: scores and probability gradients of a block being reduced and of the next one (four, in
        # the model's dtype), and in fp32 probabilities, their gradient, its product with them, the scores' gradient.
        blocks = self.score_blocks(shape)
        largest = max(rows for rows, _ in blocks) * max(keys for _, keys in blocks)
        return shape.b * shape.output_slots * largest * (4 * itemsize + 4 * 4)

    def _reduced(self, shape: AttentionShape, elements: int) -> int:
        # A ring all-reduce receives every element of a share twice, 2 (n-1)/n of the buffer.
        return 2 * (shape.n - 1) * elements // shape.n

    def _statistics(self, shape: AttentionShape) -> int:
        return self.norm_sums(shape) * shape.s * shape.b * _heads(shape)

    def elements(self, shape: AttentionShape, block: int = SCORES_BLOCK) -> int:
        summed = self._statistics(shape) + self.score_elements(shape, block)
        return self.rotary_halves(shape) + self._reduced(shape, summed)

    def bytes(self, shape: AttentionShape, itemsize: int) -> int:
        return self._in_bytes(shape, self.elements(shape), itemsize)

    def bytes_backward(self, shape: AttentionShape, itemsize: int) -> int:
        return self._in_bytes(shape, self.elements_backward(shape), itemsize)

    def _in_bytes(self, shape: AttentionShape, elements: int, itemsize: int) -> int:
        statistics = self._reduced(shape, self._statistics(shape))
        return (elements - statistics) * itemsize + statistics * 4  # statistics travel in fp32

    def elements_backward(self, shape: AttentionShape, block: int = SCORES_BLOCK) -> int:
        # Probabilities are not kept (at most one block of scores exists at a time), so backward reduces
        # the recomputed scores and the partial gradients of the probabilities.
        summed = self._statistics(shape) + 2 * self.score_elements(shape, block)
        return self.rotary_halves(shape) + self._reduced(shape, summed)


def _heads(shape: AttentionShape) -> int:
    """Query and key heads of one rank."""
    return shape.h // shape.m + shape.g // shape.m
