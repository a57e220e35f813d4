"""Whatever Megatron-LM's parser read beside a grid is settled, or refused in one short line at once."""

from __future__ import annotations

import argparse
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from hp_plugin.exchange.rules import EXCHANGES
from hp_plugin.grid.ranks import ORDERS
from hp_plugin.megatron_lm import flags
from tests.adapters.test_flags import STOCK
from tests.inputs import FUZZ, WORDS, accepted

INTEGERS = [name for name, value in STOCK.items() if type(value) is int and name != "rank"] + ["kv_channels"]
SIZES = st.one_of(st.integers(-2, 64), st.sampled_from([10**9 + 1, 2**63, 10**400, 10**5000]))
GRIDS = st.one_of(st.sampled_from(["1,2", "2,2", "2,4", "4,2", "8,1", "auto"]), WORDS)


@FUZZ
@given(
    GRIDS,
    st.sampled_from([None, *EXCHANGES]),
    st.sampled_from([None, *ORDERS]),
    st.dictionaries(st.sampled_from(INTEGERS), SIZES, max_size=3),
    st.dictionaries(st.sampled_from(["rotary_percent"]), st.floats(), max_size=1),
    st.booleans(),
)
def test_arguments(
    grid: str, exchange: str | None, order: str | None, sizes: dict[str, int], rotary: dict[str, float], grouped: bool
) -> None:
    ours = {"head_dim_parallel": grid, "head_dim_exchange": exchange, "head_dim_order": order}
    given_values: dict[str, Any] = STOCK | sizes | rotary | ours | {"group_query_attention": grouped}

    def settle() -> None:
        args = argparse.Namespace(**given_values)
        head_dim = flags.settle(args, [flags.TP_FLAG])
        assert head_dim is not None and args.tensor_model_parallel_size == head_dim.size

    accepted(settle)
