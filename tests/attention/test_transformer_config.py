"""A model's configuration with a grid in it: how the grid may be given, and what is refused; starts no ranks."""

from argparse import Namespace
from dataclasses import fields, replace
from typing import Any

import pytest

from hp_plugin import cpu_backend
from hp_plugin.attention.transformer_config import HeadDimTransformerConfig, unsupported
from hp_plugin.checkpoint.rules import record_head_dim
from hp_plugin.config import HeadDimConfig
from hp_plugin.refusal import RefusedError

MODEL: dict[str, Any] = dict(num_layers=1, hidden_size=48, num_attention_heads=6, num_query_groups=2, kv_channels=8)


@pytest.fixture(autouse=True)
def on_the_cpu() -> None:
    cpu_backend.enable()


def config(head_dim: Any, **changes: Any) -> HeadDimTransformerConfig:
    return HeadDimTransformerConfig(**MODEL | changes, head_dim_parallel=head_dim)


@pytest.mark.parametrize("head_dim", [HeadDimConfig(2, 2), "2,2", (2, 2), [2, 2]])
def test_a_grid_may_be_given_as_words_or_numbers(head_dim: Any) -> None:
    made = config(head_dim)
    assert made.head_dim_parallel == HeadDimConfig(2, 2) and made.tensor_model_parallel_size == 4
    assert made.num_attention_heads == 6 and made.num_query_groups == 2


@pytest.mark.parametrize("head_dim", ["2x2", (2, 2, 2), 4, {"m": 2, "n": 2}, (2, "2")])
def test_what_is_no_grid_is_one_clear_error(head_dim: Any) -> None:
    with pytest.raises(ValueError, match=r"head.dim.parallel"):
        config(head_dim)


def test_what_the_words_leave_open_is_taken_beside_them() -> None:
    beside = {"head_dim_exchange": "sequence", "head_dim_order": "head-innermost"}
    whole = HeadDimConfig(2, 2, "sequence", "head-innermost")
    for head_dim in ("2,2", (2, 2), whole):
        made = config(head_dim, **beside)
        assert made.head_dim_parallel == whole
        assert replace(made, head_dim_parallel="1,4").head_dim_parallel == HeadDimConfig(1, 4)
    with pytest.raises(ValueError, match=r"--head-dim-exchange sequence.* contradicts .*--head-dim-exchange batch"):
        config(HeadDimConfig(2, 2, "batch"), head_dim_exchange="sequence")
    with pytest.raises(ValueError, match=r"unknown exchange 'seq': choose from"):
        config("2,2", head_dim_exchange="seq")
    with pytest.raises(ValueError, match=r"'head-innermost' are a grid's: give head_dim_parallel"):
        config(None, head_dim_order="head-innermost")


def test_a_configuration_made_of_megatron_lms_arguments_has_the_whole_grid() -> None:
    args, whole = Namespace(**MODEL), HeadDimConfig(2, 2, "scores", "head-innermost")
    record_head_dim(args, whole)
    # As `core_transformer_config_from_args` does: whatever argument has the name of a field.
    named = {field.name: getattr(args, field.name) for field in fields(HeadDimTransformerConfig) if field.name in args}
    assert HeadDimTransformerConfig(**named).head_dim_parallel == whole


def test_another_exchange_is_named_only_where_it_fits() -> None:
    head_dim = HeadDimConfig(2, 2, "scores")
    offset = {"softmax_type": "off-by-one"}
    with pytest.raises(RefusedError, match=r"`scores` cannot do a softmax offset; --head-dim-exchange batch can$"):
        config(head_dim, micro_batch_size=2, seq_length=8, **offset)
    with pytest.raises(RefusedError, match=r"`scores` cannot do a softmax offset$"):
        config(head_dim, micro_batch_size=3, seq_length=8, **offset)
    with pytest.raises(RefusedError, match=r"softmax offset; --head-dim-exchange batch can where it fits$"):
        config(head_dim, **offset)


def test_auto_says_why_each_of_its_exchanges_fails() -> None:
    with pytest.raises(RefusedError) as refused:
        config((2, 2), micro_batch_size=3, seq_length=8, softmax_type="off-by-one")
    assert [refusal.kind for refusal in refused.value.refusals] == ["shape", "feature", "feature"]


def test_refusals_are_values() -> None:
    made = config((2, 2))
    made.qk_clip = made.log_max_attention_logit = True
    refusals = unsupported(made, HeadDimConfig(2, 2))
    assert [refusal.kind for refusal in refusals] == ["feature", "feature"]
    assert all(refusal.text.endswith("use n=1, where m could be 1, 2") for refusal in refusals)
    assert unsupported(made, HeadDimConfig(4, 1)) == []
