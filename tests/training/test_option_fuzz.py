"""Whatever the trainer and a model's configuration are given is accepted, or refused in one short line at once."""

from __future__ import annotations

import sys
from contextlib import redirect_stderr
from dataclasses import fields
from io import StringIO
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hp_plugin import HeadDimTransformerConfig
from hp_plugin.training.arguments import parse_arguments
from hp_plugin.training.checks import check_config
from hp_plugin.training.config import TrainingConfig
from hp_plugin.training.options import flag
from hp_plugin.training.transformer import build_transformer_config
from tests.inputs import FUZZ, VALUES, WORDS, accepted

SMALL = {
    "num_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "seq_length": 16,
    "micro_batch_size": 2,
    "train_iters": 3,
    "lr": 1e-3,
}
NAMES = [option.name for option in fields(TrainingConfig)]
# Read or made on the spot, by tests of their own.
FILES = {"load", "save", "data_path", "data_cache_path", "loss_file", "tensorboard_dir"}
OPTIONS = st.dictionaries(st.sampled_from(sorted({*NAMES} - FILES)), VALUES, min_size=1, max_size=3)
# Numbers in their domains, whose combinations are what is refused.
SIZES = ["num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "seq_length"]
SIZES += ["micro_batch_size", "global_batch_size", "tensor_model_parallel_size", "pipeline_model_parallel_size"]
SIZES += ["context_parallel_size", "num_experts", "expert_model_parallel_size", "moe_router_topk", "ffn_hidden_size"]
SIZED = st.dictionaries(
    st.sampled_from(SIZES), st.one_of(st.integers(1, 12), st.sampled_from([10**9 + 1, 10**18])), max_size=4
)
GRIDS = st.sampled_from([None, "1,2", "2,2", "4,1", "2,4", "auto"])


@FUZZ
@given(OPTIONS)
def test_options_from_python(given_options: dict[str, Any]) -> None:
    accepted(lambda: check_config(TrainingConfig(**SMALL | given_options), 8))


@FUZZ
@given(SIZED, GRIDS, st.sampled_from([1, 2, 4, 6, 8, 10**6]))
def test_sizes_that_may_contradict_each_other(sizes: dict[str, Any], grid: str | None, world_size: int) -> None:
    def check() -> None:
        config = TrainingConfig(**SMALL | sizes | {"head_dim_parallel": grid})
        check_config(config, world_size)
        if config.num_layers < 1000:
            build_transformer_config(config, world_size)

    accepted(check)


@FUZZ
@given(st.lists(st.tuples(st.sampled_from([*map(flag, NAMES), "--x", "-h x", ""]), WORDS), max_size=3))
def test_the_command_line(words: list[tuple[str, str]]) -> None:
    line = [word for name, value in SMALL.items() for word in (flag(name), str(value))]
    line += [word for pair in words for word in pair]

    def parse() -> None:
        said = StringIO()
        try:
            with redirect_stderr(said):
                parse_arguments(line)
        except SystemExit as end:
            assert end.code == 2 and said.getvalue().endswith("\n")
            raise ValueError(said.getvalue()[:-1].removeprefix(sys.argv[0].rpartition("/")[2])) from None

    accepted(parse)


STOCK = [field.name for field in fields(HeadDimTransformerConfig) if field.init]
ODD: list[Any] = [None, True, 0, -1, 3, 10**400, 0.5, float("nan"), float("inf"), "", "x" * 5000, [], ["x"], {}, ()]


@pytest.mark.parametrize("name", sorted({*NAMES} - FILES))
def test_every_option_with_every_odd_value(name: str) -> None:
    for value in ODD:
        accepted(lambda value=value: check_config(TrainingConfig(**SMALL | {name: value}), 8))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", STOCK)
def test_every_field_of_a_model_on_a_grid_with_every_odd_value(name: str) -> None:
    sizes = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "head_dim_parallel": "2,2"}
    for value in ODD:
        accepted(lambda value=value: HeadDimTransformerConfig(**sizes | {name: value}))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@FUZZ
@given(
    st.sampled_from(["1,2", "2,2", "2,1", (2, 2), [1, 2], "2,2,2"]),
    st.dictionaries(st.sampled_from(STOCK), VALUES, max_size=3),
    st.booleans(),
)
def test_a_model_on_a_grid(grid: Any, options: dict[str, Any], sized: bool) -> None:
    sizes = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 4} if sized else {}
    accepted(lambda: HeadDimTransformerConfig(**{"head_dim_parallel": grid} | sizes | options))


@pytest.mark.parametrize("grid", [(2, 2), "2,2"])
def test_a_grid_without_a_model_is_refused(grid: Any) -> None:
    with pytest.raises(ValueError, match="num_layers must be a positive integer, got 0"):
        HeadDimTransformerConfig(head_dim_parallel=grid)
