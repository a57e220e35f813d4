"""A way out that a refusal names is one: whoever follows it is not refused for another reason, over all exchanges."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hp_plugin.config import HeadDimConfig
from hp_plugin.exchange.advice import unsupported_by
from hp_plugin.exchange.rules import EXCHANGES, RULES, resolve
from hp_plugin.exchange.sizes import AttentionShape
from hp_plugin.refusal import RefusedError
from tests.shapes import EXAMPLES, grid_shapes

NAMED = re.compile(r"--head-dim-exchange ([a-z]+(?: or [a-z]+)*) can(?: where it fits)?$")
ALONE = ("do a softmax offset", "do context parallelism (2)", "do flash decoding", "add an attention bias")


def named(text: str) -> list[str]:
    found = NAMED.search(text)
    return found[1].split(" or ") if found else []


def model(wanted: frozenset[str]) -> Any:
    """A model's configuration that asks for some of what some exchange cannot do."""
    config = SimpleNamespace(
        context_parallel_size=2 if "context" in wanted else 1,
        transformer_impl="inference_optimized" if "inference" in wanted else "local",
        fp8="e4m3" if "fp8" in wanted else None,
        distribute_saved_activations="distribute" in wanted,
        cuda_graph_impl="local" if "graphs" in wanted else "none",
        overlap_moe_expert_parallel_comm="overlap" in wanted,
        delay_wgrad_compute="delay" in wanted,
        defer_embedding_wgrad_compute="defer" in wanted,
        moe_router_load_balancing_type="seq_aux_loss" if "balance" in wanted else "aux_loss",
    )
    if "yarn" in wanted:
        config.yarn_rotary_scaling_factor = 4.0
    return config


FEATURES = ("context", "inference", "fp8", "distribute", "graphs", "overlap", "delay", "defer", "balance", "yarn")
MODELS = st.frozensets(st.sampled_from(FEATURES), max_size=3).map(model)
ASKED = st.lists(st.sampled_from(ALONE), unique=True, max_size=2).map(tuple)


def refusal_of(exchange: str, shape: AttentionShape) -> str | None:
    try:
        resolve(exchange, shape)
    except RefusedError as error:
        return str(error)
    return None


@pytest.mark.parametrize("exchange", EXCHANGES)
@EXAMPLES
@given(grid_shapes(), ASKED)
def test_an_exchange_that_a_shape_is_sent_to_takes_it(
    exchange: str, shape: AttentionShape, alone: tuple[str, ...]
) -> None:
    shape = replace(shape, stock_core_alone=alone)
    said = refusal_of(exchange, shape)
    for other in named(said or ""):
        assert refusal_of(other, shape) is None, said


@pytest.mark.parametrize("other", RULES)
@pytest.mark.parametrize("exchange", RULES)
@EXAMPLES
@given(grid_shapes(), MODELS, ASKED)
def test_an_exchange_that_a_model_is_sent_to_takes_it(
    exchange: str, other: str, shape: AttentionShape, config: Any, alone: tuple[str, ...]
) -> None:
    shape = replace(shape, stock_core_alone=alone)
    for refusal in unsupported_by(exchange, config, alone, shape):
        assert exchange not in named(refusal.text)
        if other in named(refusal.text):
            assert not list(unsupported_by(other, config, alone, shape))
            assert refusal_of(other, shape) is None
    for refusal in unsupported_by(exchange, config, alone):
        if other in named(refusal.text):
            # Where it fits: not for what the model asks for, at least.
            assert refusal.text.endswith("can where it fits") and not list(unsupported_by(other, config, alone))


@EXAMPLES
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 24), st.integers(1, 24), st.integers(1, 24))
def test_a_grid_that_heads_are_sent_to_fits_them(m: int, n: int, heads_per_group: int, g: int, d: int) -> None:
    h = heads_per_group * g
    try:
        HeadDimConfig(m, n).check_heads(h, g, d)
    except RefusedError as error:
        said = str(error)
    else:
        return
    whole = re.search(rf"{m * n} ranks could be (.*)$", said)
    if whole:
        for text in re.findall(r"\d+,\d+", whole[1]):
            grid = HeadDimConfig.parse(text)
            assert grid.size == m * n
            grid.check_heads(h, g, d)
        return
    apart = re.search(rf"no grid of {m * n} ranks fits; m could be ([\d, …]+), and n ([\d, …]+)$", said)
    assert apart is not None, said
    for left in re.findall(r"\d+", apart[1]):
        for right in re.findall(r"\d+", apart[2]):
            HeadDimConfig(int(left), int(right)).check_heads(h, g, d)
    assert all(g % a or h % a or d % (m * n // a) for a in range(1, m * n + 1) if m * n % a == 0)
