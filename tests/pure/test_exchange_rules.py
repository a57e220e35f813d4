"""Volumes in the closed forms of the design, against a count over simulated ranks."""

from dataclasses import replace
from fractions import Fraction

import pytest

from hp_plugin.exchange.local.rule import LocalRule
from hp_plugin.exchange.rule import STOCK
from hp_plugin.exchange.rules import RULES, resolve
from hp_plugin.exchange.scores.rule import ScoresRule
from hp_plugin.exchange.sequence.blocks import Blocks
from hp_plugin.exchange.sizes import AttentionShape, Cached, Inner, cache_block

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


WHOLE = 24 * 6 * 15
"""Elements of one slot of SHAPES[0] on one rank: 4 query slots and 1 each for keys and values."""


@pytest.mark.parametrize(
    ("name", "inner", "traded_in", "traded_out", "kept"),
    [
        ("stock", Inner(6, 24, 30), 0, 0, 0),
        ("batch", Inner(3, 24, 30), 6 * WHOLE, 4 * WHOLE, 4 * WHOLE),
        # Both ranks get all keys and values, so each sends its slice of them twice, and keeps the other's.
        ("sequence", Inner(6, 12, 30), (4 + 2 * 2) * WHOLE, 4 * WHOLE, (4 + 2) * WHOLE),
        ("scores", Inner(6, 24, 15), 0, 0, 0),
        ("local", Inner(6, 24, 15), 0, 0, 0),
    ],
)
def test_what_attention_sees_and_what_is_traded_and_kept_by_hand(
    name: str, inner: Inner, traded_in: int, traded_out: int, kept: int
) -> None:
    rule, shape = {"stock": STOCK, **RULES}[name], SHAPES[0]
    assert rule.inner(shape) == inner
    assert (rule.traded_in(shape), rule.traded_out(shape), rule.kept(shape)) == (traded_in, traded_out, kept)
    held = 6 * 4 * 24 * 24 * (4 * 2 + 16) if name == "scores" else 2 * traded_in * 2
    assert rule.held_bytes(shape, 2) == held
    if name != "scores":
        assert rule.elements(shape) == (traded_in + traded_out) // 2
        assert rule.score_blocks(shape) == ()


def test_an_output_gate_travels_with_the_queries() -> None:
    gated = replace(SHAPES[0], gate=True)
    for name in ("batch", "sequence"):
        assert RULES[name].traded_in(gated) - RULES[name].traded_in(SHAPES[0]) == 4 * WHOLE
        assert RULES[name].traded_out(gated) == RULES[name].traded_out(SHAPES[0])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("block", [1, 5, 24, 1000])
def test_blocks_of_scores_hold_every_query_once_and_every_key_it_sees(block: int, causal: bool) -> None:
    shape = replace(SHAPES[0], causal=causal)
    at = 0
    for queries, keys in ScoresRule().score_blocks(shape, block):
        at += queries
        assert 0 < queries <= block and keys == (at if causal else shape.s)
    assert at == shape.s


@pytest.mark.parametrize(("rotary", "n"), [(8, 4), (4, 4), (6, 2), (2, 4), (8, 1)])
def test_rotary_halves_are_the_partners_that_other_ranks_hold(rotary: int, n: int) -> None:
    shape = AttentionShape(s=16, b=2, h=4, g=2, d=8, m=2, n=n, rotary=rotary)
    apart = [(channel, channel + rotary // 2) for channel in range(rotary // 2)]
    apart = [(one, other) for one, other in apart if one * n // 8 != other * n // 8]
    # Both of a pair lack the other; the mean over the n ranks of a dim group, in 3 query and key heads.
    assert ScoresRule().rotary_halves(shape) == 16 * 2 * 3 * 2 * len(apart) // n
    assert ScoresRule().rotary_halves(replace(shape, rotary_interleaved=True)) == 0
    assert RULES["batch"].rotary_halves(shape) == 0


def test_norms_of_slices_sum_for_every_head_and_token() -> None:
    plain = SHAPES[0]
    for norm, sums in (("RMSNorm", 1), ("L2Norm", 1), ("LayerNorm", 2)):
        shape = replace(plain, qk_norm=norm)
        assert RULES["scores"].norm_sums(shape) == sums
        assert {rule.norm_sums(shape) for rule in (STOCK, RULES["batch"], RULES["sequence"], LocalRule())} == {0}
        # Summed by an all-reduce over 2 ranks, and whole in fp32 beside 16-bit scores.
        more = ScoresRule().bytes(shape, 2) - ScoresRule().bytes(plain, 2)
        assert more == 4 * sums * (12 + 3) // 3 * 24 * 6


DECODING = AttentionShape(s=1, b=3, h=4, g=2, d=8, m=2, n=4, cache=1000)
"""2 query heads and one key/value head of a rank, whose slices have 2 channels."""


def test_a_cache_is_nowhere_twice() -> None:
    shape = replace(DECODING, b=8, cache=1024)
    whole = 2 * 8 * 1024 * shape.g * shape.d
    for name in ("batch", "sequence", "local"):
        part = RULES[name].cached(shape)
        assert part is not None and part.elements(shape.g // shape.m) * shape.m * shape.n == whole
    assert RULES["batch"].cached(shape) == Cached(2, 1024, 8)
    assert RULES["sequence"].cached(shape) == Cached(8, 256, 8)
    assert RULES["local"].cached(shape) == Cached(8, 1024, 2)
    assert STOCK.cached(shape) == Cached(8, 1024, 8)
    for b, other in ((8, "batch"), (7, "sequence")):
        assert RULES["weights"].cached(replace(shape, b=b)) == RULES[other].cached(replace(shape, b=b))
    assert RULES["scores"].cached(shape) is None
    assert str(RULES["scores"].refusal(shape)).startswith("`scores` has no key/value cache")


@pytest.mark.parametrize(("tokens", "block"), [(1024, 16), (96, 8), (40, 2), (44, 1), (17, 1)])
def test_blocks_make_equal_parts_where_they_can(tokens: int, block: int) -> None:
    assert cache_block(tokens, 4) == block
    held = [sum(token // block % 4 == rank for token in range(tokens)) for rank in range(4)]
    assert sum(held) == tokens and (tokens % 4 or len(set(held)) == 1)
    for j in range(4):
        blocks = Blocks(4, j, block)
        assert blocks.rows(tokens) == held[j]
        assert blocks.positions(0, tokens) == [token for token in range(tokens) if token // block % 4 == j]
        assert blocks.positions(5, 12) == [token for token in range(5, 12) if token // block % 4 == j]


def test_a_token_behind_a_cache_has_no_share_of_its_own() -> None:
    prompt = replace(DECODING, s=16, cache=16)
    assert RULES["weights"].missing(prompt) is None
    assert "needs a batch size divisible by n behind a key/value cache" in (RULES["weights"].missing(DECODING) or "")
    assert RULES["weights"].missing(replace(DECODING, b=8)) is None


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 64, 1000, 1023, 1025])
def test_blocks_of_tokens_go_round_and_the_first_rank_has_most(tokens: int) -> None:
    held = [Blocks(4, j, cache_block(tokens, 4)).rows(tokens) for j in range(4)]
    part = RULES["sequence"].cached(replace(DECODING, cache=tokens))
    assert part is not None and part.tokens == held[0] == max(held) and sum(held) == tokens


def test_a_decoded_token_goes_to_all_parts_of_the_cache_and_their_outputs_come_back() -> None:
    rule, shape = RULES["sequence"], DECODING
    assert rule.missing(shape) is None, "one token is no multiple of 2n, and need not be"
    assert rule.missing(replace(shape, cache=0)) and rule.missing(replace(shape, s=12)) is None
    # A prompt that has the chunks is attended to as without a cache; one that has not is as any piece behind one.
    prompt = replace(shape, s=16, cache=16)
    assert rule.elements(prompt) == rule.elements(replace(prompt, cache=0)) and not rule.joined(prompt)
    assert rule.joined(replace(prompt, s=12, cache=12)) and rule.inner(replace(shape, s=12)) == Inner(3, 12, 8)
    assert rule.inner(shape) == Inner(3, 1, 8)
    # From each of 3 others: 2 channels of 2 queries, a key and a value, and its part of 2 channels of 2 outputs.
    received = 3 * 3 * 2 * (2 + 1 + 1) + 3 * 3 * 2 * 2
    assert rule.elements(shape) == received
    # A log-sum-exp of 2 heads in fp32 beside it.
    assert rule.bytes(shape, 2) == 2 * received + 4 * 3 * 3 * 2
    assert rule.traded_in(shape) == rule.traded_out(shape) == 0
    # Where n divides b whole samples move less.
    several = replace(shape, b=4)
    assert RULES["batch"].bytes(several, 2) == 2 * 3 * 4 * 2 * (2 + 1 + 1 + 2) // 4 < rule.bytes(several, 2)


def test_auto_caches_by_samples_where_they_divide() -> None:
    assert resolve("auto", replace(DECODING, b=4)) == "batch"
    assert resolve("auto", DECODING) == "sequence"
