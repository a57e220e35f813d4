"""Every message a user can get from a mistyped or unfitting grid, before anything is built."""

import pytest

from hp_plugin.config import HeadDimConfig
from hp_plugin.exchange.sizes import AttentionShape
from hp_plugin.grid.ranks import Grid
from hp_plugin.refusal import RefusedError


def shape(**changes: object) -> AttentionShape:
    return AttentionShape(**{**dict(s=24, b=4, h=12, g=6, d=80, m=3, n=4), **changes})


@pytest.mark.parametrize(("text", "m", "n"), [("4,4", 4, 4), (" 3 , 5 ", 3, 5), ("1,16", 1, 16)])
def test_parse(text: str, m: int, n: int) -> None:
    config = HeadDimConfig.parse(text, "scores")
    assert (config.m, config.n, config.exchange, config.size) == (m, n, "scores", m * n)


@pytest.mark.parametrize("text", ["4x4", "4,4,4", "4", "", "2.0,2", "a,b", "4;4", "4,"])
def test_parse_refuses_what_is_not_two_integers(text: str) -> None:
    with pytest.raises(
        ValueError, match=r"two integers m,n \(for example 4,4\), got " + repr(text).replace("[", r"\[")
    ):
        HeadDimConfig.parse(text)


@pytest.mark.parametrize(
    ("text", "message"), [("0,4", "m must be at least 1, got 0"), ("2,-2", "n must be at least 1, got -2")]
)
def test_parse_refuses_sizes_below_one(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HeadDimConfig.parse(text)


@pytest.mark.parametrize("size", [2.0, "2", None, True])
def test_sizes_are_integers(size: object) -> None:
    with pytest.raises(ValueError, match="m must be an integer, got"):
        HeadDimConfig(size, 2)  # type: ignore[arg-type]


def test_a_configuration_carries_its_grid_through_every_change() -> None:
    config = HeadDimConfig(3, 4)
    assert config.grid == Grid(3, 4) and config.flag == "3,4"
    assert config.with_exchange("scores").grid == Grid(3, 4)
    assert config == HeadDimConfig(3, 4) and len({config, HeadDimConfig(3, 4)}) == 1


def test_the_order_of_ranks_goes_into_the_grid_and_its_flags() -> None:
    config = HeadDimConfig(3, 4, order="head-innermost")
    assert config.grid == Grid(3, 4, "head-innermost") != HeadDimConfig(3, 4).grid
    assert config.with_exchange("scores").grid == config.grid
    assert " ".join(config.flags) == "--head-dim-parallel 3,4 --head-dim-exchange auto --head-dim-order head-innermost"
    assert HeadDimConfig(3, 4, "batch").flags == ["--head-dim-parallel 3,4", "--head-dim-exchange batch"]
    assert HeadDimConfig.parse("3,4", order="head-innermost") == config
    with pytest.raises(ValueError, match="unknown head-dim-order 'head': choose from dim-innermost, head-innermost"):
        HeadDimConfig(3, 4, order="head")


def test_a_grid_may_be_said_in_three_ways() -> None:
    config = HeadDimConfig(3, 4)
    assert HeadDimConfig.of(config) is config
    assert HeadDimConfig.of("3,4") == HeadDimConfig.of((3, 4)) == HeadDimConfig.of([3, 4]) == config


@pytest.mark.parametrize("wrong", [4, 2.0, (2,), (2, 2, 2), {"m": 2, "n": 2}])
def test_what_is_no_grid_is_said_with_an_example(wrong: object) -> None:
    with pytest.raises(ValueError, match=r'takes a HeadDimConfig, "m,n" or a pair \(m, n\), for example .*; got '):
        HeadDimConfig.of(wrong)  # type: ignore[arg-type]


def test_unknown_exchange_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown exchange 'batches': choose from .*; did you mean 'batch'\?"):
        HeadDimConfig(2, 2, "batches")


def test_contradicting_tensor_parallel_size_names_both() -> None:
    HeadDimConfig(2, 4).check_tensor_parallel_size(8)
    HeadDimConfig(2, 4).check_tensor_parallel_size(None)
    with pytest.raises(ValueError, match=r"--tensor-model-parallel-size 4 contradicts --head-dim-parallel 2,4, .* = 8"):
        HeadDimConfig(2, 4).check_tensor_parallel_size(4)


def test_world_size_names_the_product() -> None:
    HeadDimConfig(2, 2).check_world_size(16, pipeline=2)
    with pytest.raises(ValueError, match=r"world size 12 is not a multiple of 8 \(head-dim-parallel 2,2 × PP=2\)"):
        HeadDimConfig(2, 2).check_world_size(12, pipeline=2)


def test_heads_say_which_m_would_do() -> None:
    HeadDimConfig(3, 4).check_heads(12, 6, 80)
    with pytest.raises(
        ValueError,
        match=r"m=4 must divide both .* \(12\) and .* \(6\): 16 ranks could be 1,16 or 2,8$",
    ):
        HeadDimConfig(4, 4).check_heads(12, 6, 80)
    with pytest.raises(ValueError, match=r"m=5 must divide both"):
        HeadDimConfig(5, 1).check_heads(12, 6, 80)
    with pytest.raises(
        ValueError,
        match=r"n=3 must divide .* \(80\): no grid of 9 ranks fits; m could be 1, 2, 3, 6, and n 1, 2, 4,",
    ):
        HeadDimConfig(3, 3).check_heads(12, 6, 80)
    with pytest.raises(ValueError, match=r"num_attention_heads \(12\) must be a multiple of num_query_groups \(5\)"):
        HeadDimConfig(1, 2).check_heads(12, 5, 80)


def test_auto_takes_the_cheapest_that_fits() -> None:
    config = HeadDimConfig(3, 4)
    assert config.check_shape(shape()) == "batch"
    assert config.check_shape(shape(b=3)) == "sequence"
    assert config.check_shape(shape(b=3, s=25)) == "scores"
    assert HeadDimConfig(3, 1).check_shape(shape(n=1, b=3, s=25)) == "batch"


def test_auto_says_why_nothing_fits() -> None:
    awkward = shape(b=1, s=7, d=20, rotary=20, rotary_interleaved=True)
    with pytest.raises(
        ValueError, match=r"`batch` needs .* 1 % 4 = 1; `sequence` needs .* 7 % 8 = 7; `scores` needs an even slice"
    ):
        HeadDimConfig(3, 4).check_shape(awkward)


@pytest.mark.parametrize(
    ("exchange", "changes", "message"),
    [
        ("batch", {"b": 6}, r"micro-batch size divisible by n: 6 % 4 = 2; --head-dim-exchange sequence or scores can"),
        (
            "sequence",
            {"s": 28},
            r"sequence length divisible by 2n .*: 28 % 8 = 4; --head-dim-exchange batch or scores can",
        ),
        (
            "scores",
            {"d": 20, "rotary": 20, "rotary_interleaved": True},
            r"even slice when rotary pairs are interleaved.*d/n = 20/4 = 5",
        ),
        ("local", {"d": 20, "rotary": 20}, r"even slice for rotary embeddings: d/n = 20/4 = 5"),
        ("local", {"rotary": 20}, r"20 rotated channels over n = 4 slices"),
    ],
)
def test_an_exchange_says_what_it_needs_and_who_can(exchange: str, changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HeadDimConfig(3, 4, exchange).check_shape(shape(**changes))


def test_no_exchange_is_named_that_cannot_do_all_that_is_asked_for() -> None:
    bias = {"stock_core_alone": ("add an attention bias",)}
    with pytest.raises(RefusedError) as refused:
        HeadDimConfig(3, 4, "sequence").check_shape(shape(**bias))
    assert str(refused.value) == "exchange `sequence` cannot add an attention bias; --head-dim-exchange batch can"
    assert [reason.kind for reason in refused.value.refusals] == ["feature"]
    # `batch` could add the bias, but not split this micro-batch: nothing is left to be named.
    with pytest.raises(RefusedError) as refused:
        HeadDimConfig(3, 4, "sequence").check_shape(shape(b=3, **bias))
    assert str(refused.value) == "exchange `sequence` cannot add an attention bias"
    # `sequence` and `scores` could split it, but not add the bias.
    with pytest.raises(RefusedError) as refused:
        HeadDimConfig(3, 4).check_shape(shape(b=3, **bias))
    assert "can" not in str(refused.value).rpartition(";")[2].replace("cannot", "")
    assert [reason.kind for reason in refused.value.refusals] == ["shape", "feature", "feature"]


def test_the_way_out_of_slices_is_a_grid_that_the_heads_allow() -> None:
    assert HeadDimConfig(2, 3).without_slices(12, 6) == "use n=1 (--head-dim-parallel 6,1)"
    assert HeadDimConfig(2, 4).without_slices(12, 6) == "use n=1, where m could be 1, 2, 3, 6"
    assert HeadDimConfig(2, 4).without_slices(None, None) == "use a grid with n=1"


def test_scores_carries_odd_slices_of_rotate_half_pairs() -> None:
    assert HeadDimConfig(3, 4, "scores").check_shape(shape(d=20, rotary=20)) == "scores"


def test_widest_grid_of_a_tensor_parallel_size() -> None:
    assert HeadDimConfig.widest(16, 8) == HeadDimConfig(8, 2)
    assert HeadDimConfig.widest(12, 8) == HeadDimConfig(4, 3)
    assert HeadDimConfig.widest(8, 1) == HeadDimConfig(1, 8)


def test_only_local_is_another_function() -> None:
    assert HeadDimConfig(2, 2).exact and HeadDimConfig(2, 2, "scores").exact and HeadDimConfig(2, 1, "local").exact
    assert not HeadDimConfig(2, 2, "local").exact
