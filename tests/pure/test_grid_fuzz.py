"""Whatever is given as a grid is one, or is refused in one short line."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from hp_plugin.config import HeadDimConfig
from hp_plugin.exchange.rules import EXCHANGES
from hp_plugin.grid.ranks import ORDERS
from tests.inputs import FUZZ, VALUES, WORDS, accepted

EXCHANGE = st.one_of(st.sampled_from(EXCHANGES), VALUES)
ORDER = st.one_of(st.sampled_from(ORDERS), VALUES)
SIZE = st.one_of(st.integers(1, 4), VALUES)


@FUZZ
@given(SIZE, SIZE, EXCHANGE, ORDER)
def test_sizes(m: Any, n: Any, exchange: Any, order: Any) -> None:
    def make() -> None:
        made = HeadDimConfig(m, n, exchange, order)
        assert made.size == made.m * made.n >= 1 and len(" ".join(made.flags)) < 100

    accepted(make)


@FUZZ
@given(WORDS, st.one_of(st.none(), EXCHANGE))
def test_words(text: str, exchange: Any) -> None:
    accepted(lambda: HeadDimConfig.of(text, exchange))


@FUZZ
@given(VALUES, st.one_of(st.none(), EXCHANGE), st.one_of(st.none(), ORDER))
def test_anything(head_dim: Any, exchange: Any, order: Any) -> None:
    accepted(lambda: HeadDimConfig.of(head_dim, exchange, order))


@FUZZ
@given(st.integers(1, 8), st.integers(1, 8), *[st.integers(1, 10**18)] * 3)
def test_heads(m: int, n: int, h: int, g: int, d: int) -> None:
    accepted(lambda: HeadDimConfig(m, n).check_heads(h, g, d))
