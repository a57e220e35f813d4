"""The grid's attention is stock attention: output, input gradient and every parameter gradient."""

import pytest

from hp_plugin.grid.ranks import HEAD_INNERMOST
from tests.dist.attention_cases import Case, differences
from tests.ranks import Ranks

EXACT = ("batch", "sequence", "scores")
YARN = {"yarn_rotary_scaling_factor": 4.0, "yarn_original_max_position_embeddings": 8, "yarn_mscale": 1.3}
YARN |= {"yarn_mscale_all_dim": 0.2, "yarn_beta_fast": 4.0, "yarn_beta_slow": 1.0}
# fp32: sums of at most a few hundred products in another order.
FP32 = 1e-5


def matrix() -> list[Case]:
    cases: list[Case] = []
    every = (*EXACT, "local")
    for exchange in every:
        rope = {}
        # MHA, GQA, MQA; degrees beyond query heads and beyond key/value heads; odd sizes
        cases += [
            Case(2, 2, exchange, h=4, g=4),
            Case(2, 2, exchange, h=4, g=2, rope=rope),
            Case(1, 4, exchange, h=4, g=1, s=16, b=4, rope=rope),
            Case(2, 2, exchange, h=2, g=2, rope=rope),
            Case(4, 1, exchange, h=4, g=4, rope=rope),
            Case(2, 3, exchange, h=6, g=2, d=18, s=18, b=3, hidden=14, rope=rope),
            Case(3, 2, exchange, h=12, g=3, d=20, s=20, b=2, hidden=26, rope=rope),
        ]
        small: dict[str, object] = dict(h=4, g=2, d=16, s=16, b=2)
        for config in (
            {"add_bias_linear": False},
            {"add_bias_linear": False, "add_qkv_bias": True},
            {"qk_layernorm": True},
            {"qk_layernorm": True, "normalization": "RMSNorm"},
            {"attention_output_gate": True},
            {"window_size": (5, 0)},
            {"softmax_scale": 0.25},
            {"apply_query_key_layer_scaling": True},
            # What stock decides per layer: the first is exempt from rotary positions, or not, or from the window.
            {"no_rope_freq": [1, 0]},
            {"no_rope_freq": [0, 1], "qk_l2_norm": True},
            {"window_size": (5, 0), "window_attn_skip_freq": [0, 1]},
        ):
            cases.append(Case(2, 2, exchange, config=config, rope=rope, **small))
        for settings in (
            {"rotary_interleaved": True},
            {"rotary_percent": 0.5},
            {"rotary_percent": 0.5, "rotary_interleaved": True},
            {"rope_scaling": True},
            {"rotary_base": 500},
        ):
            cases.append(Case(2, 2, exchange, rope=settings, **small))
        for mask in ("padding", "arbitrary", "shared"):
            cases.append(Case(2, 2, exchange, mask=mask, rope=rope, **small))
        cases.append(Case(2, 2, exchange, sequence_parallel=True, rope=rope, **small))
    for exchange in (*EXACT, "local"):
        other: dict[str, object] = dict(rope={}, order=HEAD_INNERMOST)
        cases.append(Case(2, 3, exchange, h=6, g=2, d=24, s=18, b=3, hidden=14, **other))
    cases.append(Case(3, 2, "scores", h=6, g=3, s=12, config={"qk_layernorm": True}, sequence_parallel=True, **other))
    for exchange in EXACT:
        # YaRN's frequencies, and the factor that stock multiplies queries and keys by; positions of each sample's own.
        cases.append(Case(2, 2, exchange, h=4, g=2, d=16, s=16, b=2, rope={}, config=YARN))
        cases.append(Case(2, 2, exchange, h=4, g=2, d=16, s=16, b=4, rope={"per_sample": True}))
    # What only some exchanges can carry
    cases += [
        Case(1, 4, "scores", h=2, g=1, d=12, s=7, b=3, rope={}),  # odd slices cut rotate-half pairs anywhere
        Case(1, 6, "scores", h=2, g=2, d=18, s=5, b=1, rope={"rotary_percent": 0.67}),
        Case(2, 3, "auto", h=2, g=2, d=12, s=12, b=3, rope={}),
        Case(2, 3, "auto", h=2, g=2, d=12, s=12, b=2, rope={}),
        Case(2, 3, "auto", h=2, g=2, d=12, s=11, b=2, rope={}),
        Case(2, 2, "batch", config={"softmax_type": "off-by-one"}, rope={}),
    ]
    return cases


@pytest.mark.parametrize("case", matrix(), ids=lambda case: case.label)
def test_output_and_every_gradient(ranks: Ranks, case: Case) -> None:
    for found in ranks.run(case.m * case.n, differences, case):
        assert max(found.values()) < FP32, found


def test_odd_shape_of_the_design(ranks: Ranks) -> None:
    case = Case(3, 5, "batch", h=12, g=3, d=80, s=6, b=5, hidden=30, rope={})
    for exchange in EXACT:
        changed = Case(**{**case.__dict__, "exchange": exchange, "s": 10})
        for found in ranks.run(15, differences, changed):
            assert max(found.values()) < FP32, (exchange, found)
