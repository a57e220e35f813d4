"""Exchange rules on shapes of any size, against who has to send what to whom, counted from the definitions."""

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hp_plugin.config import HeadDimConfig
from hp_plugin.exchange.rules import AUTO_ORDER, EXCHANGES, RULES, resolve
from hp_plugin.exchange.scores.rule import ScoresRule
from hp_plugin.exchange.sizes import AttentionShape
from hp_plugin.refusal import RefusedError
from tests.shapes import EXAMPLES, divided_shapes, grid_shapes

Cell = tuple[int, int, int]
"""(token, sample, channel) of one head."""


def cells(tokens: range | list[int], samples: range, channels: range) -> set[Cell]:
    return {(token, sample, channel) for token in tokens for sample in samples for channel in channels}


def received(shape: AttentionShape, j: int, queries: list[int] | range, samples: range) -> int:
    """Elements that rank j of a dim group lacks, for attention of these queries of these samples, and afterwards."""
    whole, mine = range(shape.d), range(j * shape.d // shape.n, (j + 1) * shape.d // shape.n)
    everything, all_samples = range(shape.s), range(shape.b)
    own_slice = cells(everything, all_samples, mine)
    for_queries = len(cells(queries, samples, whole) - own_slice)
    for_keys = len(cells(everything, samples, whole) - own_slice)
    for_output = len(own_slice - cells(queries, samples, whole))
    heads, kv_groups = shape.h // shape.m, shape.g // shape.m
    return heads * (2 if shape.gate else 1) * for_queries + 2 * kv_groups * for_keys + heads * for_output


def batch_received(shape: AttentionShape, j: int) -> int:
    return received(shape, j, range(shape.s), range(j * shape.b // shape.n, (j + 1) * shape.b // shape.n))


def sequence_received(shape: AttentionShape, j: int) -> int:
    chunk = shape.s // (2 * shape.n)
    starts = (j * chunk, (2 * shape.n - 1 - j) * chunk)
    return received(shape, j, [token for start in starts for token in range(start, start + chunk)], range(shape.b))


@pytest.mark.parametrize(("name", "simulated"), [("batch", batch_received), ("sequence", sequence_received)])
@EXAMPLES
@given(divided_shapes(max_n=4))
def test_trades_are_what_a_rank_lacks(
    name: str, simulated: Callable[[AttentionShape, int], int], shape: AttentionShape
) -> None:
    rule = RULES[name]
    assert rule.refusal(shape) is None
    for j in range(shape.n):
        assert rule.elements(shape) == rule.elements_backward(shape) == simulated(shape, j)


@EXAMPLES
@given(divided_shapes(), st.booleans())
def test_trades_in_the_letters_of_the_design(shape: AttentionShape, gate: bool) -> None:
    shape = replace(shape, gate=gate)
    u = Fraction(shape.s * shape.b * shape.d, shape.m * shape.n)
    queries = (3 if gate else 2) * shape.h  # there and back, and the gates there
    batch = Fraction(shape.n - 1, shape.n) * (queries + 2 * shape.g) * u
    assert RULES["batch"].elements(shape) == batch
    assert RULES["sequence"].elements(shape) == batch + Fraction((shape.n - 1) ** 2, shape.n) * 2 * shape.g * u


@EXAMPLES
@given(grid_shapes(), st.integers(1, 50))
def test_partial_scores_are_those_that_some_query_of_a_block_may_see(shape: AttentionShape, block: int) -> None:
    seen = 0
    for query in range(shape.s):
        last_of_block = min((query // block + 1) * block, shape.s) - 1
        seen += sum(1 for key in range(shape.s) if not shape.causal or key <= last_of_block)
    expected = shape.b * shape.h // shape.m * seen
    rule = ScoresRule()
    assert rule.score_elements(shape, block) == expected
    # All-reduced in a ring: of each n-th of the sums every rank is sent 2 (n-1) parts in all.
    bare = replace(shape, rotary=0, qk_norm=None)
    assert rule.elements(bare, block) == 2 * (shape.n - 1) * expected // shape.n
    assert rule.elements_backward(bare, block) == 2 * (shape.n - 1) * 2 * expected // shape.n


@EXAMPLES
@given(grid_shapes())
def test_rotary_halves_are_partners_that_lie_on_another_rank(shape: AttentionShape) -> None:
    width, half = shape.d // shape.n, shape.rotary // 2
    foreign = 0
    for j in range(shape.n):
        own = set(range(j * width, (j + 1) * width))
        pairs = [(low, low + half) for low in range(half)]
        if shape.rotary_interleaved:
            pairs = [(2 * low, 2 * low + 1) for low in range(half)]
        foreign += sum((low in own) != (high in own) for low, high in pairs)
    rule, heads = ScoresRule(), shape.h // shape.m + shape.g // shape.m
    shape = replace(shape, qk_norm=None)
    if rule.refusal(shape) is None:
        extra = rule.elements(shape) - rule.elements(replace(shape, rotary=0))
        # Every channel that is a partner of a foreign one is received once; ranks differ, so this is their mean.
        assert extra == shape.s * shape.b * heads * foreign // shape.n


@EXAMPLES
@given(grid_shapes(), st.sampled_from([("L2Norm", 1), ("RMSNorm", 1), ("LayerNorm", 2)]), st.sampled_from([2, 4]))
def test_norms_of_whole_heads_sum_one_or_two_numbers_per_head_and_token(
    shape: AttentionShape, norm: tuple[str, int], itemsize: int
) -> None:
    name, numbers = norm
    rule, heads = ScoresRule(), shape.h // shape.m + shape.g // shape.m
    shape = replace(shape, qk_norm=None, rotary=0)
    summed = numbers * shape.s * shape.b * heads
    normed = replace(shape, qk_norm=name)
    scores = rule.score_elements(shape)
    ring = Fraction(2 * (shape.n - 1), shape.n)
    assert rule.elements(normed) == ring * (scores + summed) // 1
    # In fp32 whatever the model's dtype; floors of two sums differ from the floor of one by less than an element.
    assert abs(rule.bytes(normed, itemsize) - ring * (scores * itemsize + summed * 4)) < 2 * 4


@EXAMPLES
@given(grid_shapes())
def test_nothing_moves_without_slices_and_never_less_than_nothing(shape: AttentionShape) -> None:
    for name, rule in RULES.items():
        whole = replace(shape, n=1)
        assert rule.elements(whole) == rule.elements_backward(whole) == rule.bytes(whole, 2) == 0
        if rule.refusal(shape) is None:
            assert 0 <= rule.elements(shape) <= rule.elements_backward(shape), name
    assert RULES["local"].elements(shape) == RULES["local"].elements_backward(shape) == 0


@EXAMPLES
@given(divided_shapes(), st.integers(2, 4))
def test_twice_the_samples_move_twice_as_much(shape: AttentionShape, times: int) -> None:
    for rule in RULES.values():
        exact = replace(shape, rotary=0, qk_norm=None)
        larger = rule.elements(replace(exact, b=times * exact.b))
        # A ring's parts are floored once.
        assert abs(larger - times * rule.elements(exact)) < times


@EXAMPLES
@given(grid_shapes(), st.sampled_from(EXCHANGES))
def test_what_is_chosen_fits_and_ways_out_fit(shape: AttentionShape, exchange: str) -> None:
    fits = [name for name in AUTO_ORDER if RULES[name].refusal(shape) is None]
    try:
        chosen = resolve(exchange, shape)
    except RefusedError as error:
        assert shape.n > 1
        asked = AUTO_ORDER if exchange == "auto" else (exchange,)
        assert list(error.refusals) == [RULES[name].refusal(shape) for name in asked]
        assert None not in error.refusals
        _, found, named = str(error).partition("--head-dim-exchange ")
        assert (named.removesuffix(" can").split(" or ") if found else []) == fits
        if exchange == "auto":
            assert not fits
    else:
        if shape.n > 1:
            assert RULES[chosen].refusal(shape) is None
            assert chosen == (fits[0] if exchange == "auto" else exchange)
        assert HeadDimConfig(shape.m, shape.n, exchange).check_shape(shape) == chosen
        assert HeadDimConfig(shape.m, shape.n, exchange).exact == (shape.n == 1 or exchange != "local")


@EXAMPLES
@given(grid_shapes(max_n=6))
def test_refusals_are_of_what_does_not_divide(shape: AttentionShape) -> None:
    """Needs in the letters of the design's table, each as one condition."""
    width = shape.d // shape.n
    fits = {
        "batch": shape.b % shape.n == 0,
        "sequence": shape.s % (2 * shape.n) == 0,
        "scores": shape.n == 1 or not shape.rotary_interleaved or not shape.rotary or width % 2 == 0,
        "weights": shape.b % shape.n == 0 or shape.s % (2 * shape.n) == 0,
        "local": not shape.rotary or (width % 2 == 0 and shape.rotary % (2 * shape.n) == 0),
    }
    assert {name: RULES[name].refusal(shape) is None for name in fits} == fits


@EXAMPLES
@given(divided_shapes())
def test_ranks_of_a_dim_group_attend_to_everything_once(shape: AttentionShape) -> None:
    """Work is neither lost nor doubled: n ranks' samples, queries and channels together are the micro-batch's."""
    for name in ("batch", "sequence", "scores", "local"):
        inner = RULES[name].inner(shape)
        assert shape.n * inner.samples * inner.queries * inner.channels == shape.b * shape.s * shape.d, name
        assert (inner.channels == shape.d) == (name in ("batch", "sequence") or shape.n == 1)


@EXAMPLES
@given(divided_shapes())
def test_what_stock_attention_alone_does_goes_where_stock_attention_is(shape: AttentionShape) -> None:
    asked = replace(shape, rotary=0, stock_core_alone=("do this", "do that"))
    for name, rule in RULES.items():
        found = rule.refusal(asked)
        assert (found is None) == rule.stock_core
        if found is not None:
            assert (found.kind, found.text) == ("feature", f"`{name}` cannot do this or do that")


def test_buffers_of_scores_are_as_large_as_the_largest_block() -> None:
    """600 tokens are blocks of 256, 256 and 88 queries, the last of which see all 600 keys."""
    shape = AttentionShape(s=600, b=3, h=4, g=2, d=8, m=2, n=2)
    four_halves_and_four_fp32 = 4 * 2 + 4 * 4
    assert ScoresRule().score_blocks(shape) == ((256, 256), (256, 512), (88, 600))
    assert ScoresRule().held_bytes(shape, 2) == 3 * 2 * 256 * 600 * four_halves_and_four_fp32
