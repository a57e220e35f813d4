"""Inputs nobody means: values of every type and size for fuzz tests, and what may come of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

SECONDS, CHARACTERS = 2.0, 300
# The same inputs in every run; time is measured here, of this process alone, and a slow first try is tried again.
FUZZ = settings(derandomize=True, database=None, deadline=None, max_examples=250)

LONG = "x" * 5000
NUMBERS = st.one_of(
    st.integers(-3, 17),
    st.sampled_from([0, 2**31, 2**63, 10**18, -(10**18), 10**400, 10**5000, 1000000001]),
    st.floats(),
)
WORDS = st.one_of(
    st.sampled_from(["", "auto", "2,2", "0,4", "2x2", "1e400", "nan", "\0", "\n", "é", "٢,٢", "9" * 5000 + ",1", LONG]),
    st.text(max_size=12),
)
VALUES: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    NUMBERS,
    WORDS,
    st.binary(max_size=4),
    st.lists(NUMBERS, max_size=4),
    st.lists(NUMBERS, max_size=4).map(tuple),
    st.dictionaries(WORDS, NUMBERS, max_size=3),
    st.sampled_from([[LONG] * 50, {LONG: LONG}, object(), int, ...]),
)


def accepted(ask: Callable[[], Any]) -> bool:
    """Whether an input was accepted; fails unless a refusal is a ValueError of one short line, and time is short."""
    for attempt in (1, 2):
        started = time.process_time()
        try:
            ask()
            said = None
        except ValueError as refusal:
            said = str(refusal)
        if time.process_time() - started < SECONDS:
            break
        assert attempt == 1, f"took {time.process_time() - started:.1f} s"
    if said is None:
        return True
    assert said and "\n" not in said and len(said) <= CHARACTERS, f"{len(said)} characters: {said[:400]}"
    return False
