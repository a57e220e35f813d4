"""Volumes in the closed forms of the design, against a count over simulated ranks."""

from fractions import Fraction

import pytest

from hp_plugin.exchange.local.rule import LocalRule
from hp_plugin.exchange.rule import AttentionShape
from hp_plugin.exchange.rules import RULES
from hp_plugin.exchange.scores.rule import ScoresRule

SHAPES = [
    AttentionShape(s=24, b=6, h=12, g=3, d=30, m=3, n=2),
    AttentionShape(s=30, b=15, h=12, g=3, d=80, m=3, n=5),
    AttentionShape(s=16, b=4, h=4, g=1, d=8, m=1, n=4),
    AttentionShape(s=12, b=3, h=2, g=2, d=6, m=2, n=3),
]


def u(shape: AttentionShape) -> Fraction:
    return Fraction(shape.s * shape.b * shape.d, shape.m * shape.n)


@pytest.mark.parametrize("shape", SHAPES)
def test_batch_and_sequence_in_the_letters_of_the_design(shape: AttentionShape) -> None:
    n, h, g = shape.n, shape.h, shape.g
    batch = Fraction(n - 1, n) * (2 * h + 2 * g) * u(shape)
    assert RULES["batch"].elements(shape) == batch
    assert RULES["sequence"].elements(shape) == batch + Fraction((n - 1) ** 2, n) * 2 * g * u(shape)
    assert RULES["batch"].elements_backward(shape) == batch
    assert LocalRule().elements(shape) == 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", [1, 5, 8, 1000])
def test_scores_counts_what_causal_blocks_see(shape: AttentionShape, block: int) -> None:
    rule = ScoresRule()
    seen = sum(min(shape.s, (query // block + 1) * block) for query in range(shape.s))
    scores = shape.b * (shape.h // shape.m) * seen
    assert rule.score_elements(shape, block) == scores
    assert rule.elements(shape, block) == 2 * (shape.n - 1) * scores // shape.n
    assert rule.elements_backward(shape, block) == 4 * (shape.n - 1) * scores // shape.n
    if shape.s % block == 0:
        assert scores == shape.b * (shape.h // shape.m) * shape.s * (shape.s + block) // 2


def test_full_rotate_half_brings_one_partner_for_every_channel() -> None:
    shape = AttentionShape(s=16, b=2, h=4, g=2, d=8, m=2, n=4, rotary=8)
    plain = AttentionShape(s=16, b=2, h=4, g=2, d=8, m=2, n=4)
    extra = ScoresRule().elements(shape) - ScoresRule().elements(plain)
    assert extra == (shape.h + shape.g) * u(shape)


def test_interleaved_pairs_stay_together() -> None:
    plain = AttentionShape(s=16, b=2, h=4, g=2, d=8, m=2, n=4)
    pairs = AttentionShape(s=16, b=2, h=4, g=2, d=8, m=2, n=4, rotary=8, rotary_interleaved=True)
    assert ScoresRule().elements(pairs) == ScoresRule().elements(plain)


def test_bytes_follow_the_dtype_and_nothing_moves_without_slices() -> None:
    shape = SHAPES[0]
    assert RULES["batch"].bytes(shape, 2) == 2 * RULES["batch"].elements(shape)
    whole = AttentionShape(s=24, b=6, h=12, g=3, d=30, m=3, n=1, rotary=30, qk_norm="LayerNorm")
    assert {rule.elements(whole) for rule in RULES.values()} == {0}
