"""The grid as an option of a DeepSpeed configuration: where it is read from, and what is refused."""

import base64
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hp_plugin.config import HeadDimConfig

pytest.importorskip("deepspeed")

from deepspeed.runtime.config import DeepSpeedConfig

from hp_plugin.deepspeed_adapter.config import head_dim_option, load_settings
from hp_plugin.deepspeed_adapter.settings import BATCH_KEYS, batch_sizes

# DeepSpeed leaves the files it reads to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
GRID = {"m": 4, "n": 2, "exchange": "sequence"}
SETTINGS = {"train_batch_size": 8, "head_dim_parallel": GRID}


def test_reads_a_dictionary_a_file_and_base64_alike(tmp_path: Path) -> None:
    text = json.dumps(SETTINGS)
    path = tmp_path / "ds_config.json"
    path.write_text("// DeepSpeed reads Hjson\n" + text)
    encoded = base64.urlsafe_b64encode(text.encode()).decode()
    for source in (SETTINGS, str(path), encoded):
        settings = load_settings(source)
        assert settings == SETTINGS
        assert head_dim_option(settings) == HeadDimConfig(4, 2, "sequence")


def test_a_dictionary_is_not_copied_or_changed() -> None:
    settings = json.loads(json.dumps(SETTINGS))
    assert load_settings(settings) is settings
    head_dim_option(settings)
    assert settings == SETTINGS


@pytest.mark.parametrize("source", ["no/such/file.json", base64.urlsafe_b64encode(b"[1, 2]").decode(), 7, None])
def test_refuses_what_is_no_configuration(source: Any) -> None:
    with pytest.raises(ValueError, match="config"):
        load_settings(source)


def test_refuses_a_key_that_is_there_twice(tmp_path: Path) -> None:
    path = tmp_path / "ds_config.json"
    path.write_text('{"head_dim_parallel": {"m": 1, "n": 2}, "head_dim_parallel": {"m": 2, "n": 1}}')
    with pytest.raises(ValueError, match="head_dim_parallel"):
        load_settings(str(path))


def test_the_exchange_may_be_left_out_and_the_option_too() -> None:
    assert head_dim_option({"head_dim_parallel": {"m": 2, "n": 2}}) == HeadDimConfig(2, 2, "auto")
    ordered = {"m": 2, "n": 2, "order": "head-innermost"}
    assert head_dim_option({"head_dim_parallel": ordered}) == HeadDimConfig(2, 2, order="head-innermost")
    assert head_dim_option({"train_batch_size": 8, "zero_optimization": {"stage": 1}}) is None


BAD = {
    "misspelled option": ({"head_dim_paralel": GRID}, "did you mean 'head_dim_parallel'"),
    "option with hyphens": ({"head-dim-parallel": GRID}, "did you mean 'head_dim_parallel'"),
    "no object": ({"head_dim_parallel": "4,4"}, "must be an object with m and n"),
    "misspelled exchange": ({"head_dim_parallel": {"m": 2, "n": 2, "exchnage": "auto"}}, "did you mean 'exchange'"),
    "unknown key": ({"head_dim_parallel": {"m": 2, "n": 2, "heads": 4}}, "no option 'heads'.*m, n, exchange"),
    "n missing": ({"head_dim_parallel": {"m": 2}}, "needs both m and n.* n missing"),
    "both missing": ({"head_dim_parallel": {}}, "m and n missing"),
    "m not positive": ({"head_dim_parallel": {"m": 0, "n": 2}}, "m must be at least 1, got 0"),
    "n a string": ({"head_dim_parallel": {"m": 2, "n": "2"}}, "n must be an integer, got '2'"),
    "m a boolean": ({"head_dim_parallel": {"m": True, "n": 2}}, "m must be an integer, got True"),
    "unknown exchange": ({"head_dim_parallel": {"m": 2, "n": 2, "exchange": "bach"}}, "did you mean 'batch'"),
    "unknown order": (
        {"head_dim_parallel": {"m": 2, "n": 2, "order": "dim"}},
        "unknown head-dim-order 'dim': choose from dim-innermost, head-innermost",
    ),
    "AutoTP": ({"head_dim_parallel": GRID, "tensor_parallel": {"autotp_size": 2}}, "autotp_size 2.*leave"),
    "Ulysses": ({"head_dim_parallel": GRID, "sequence_parallel_size": 2}, "sequence_parallel_size 2.*leave"),
    "hpZ": (
        {"head_dim_parallel": GRID, "zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}},
        "zero_hpz_partition_size",
    ),
    "quantized gradients": (
        {"head_dim_parallel": GRID, "zero_optimization": {"stage": 3, "zero_quantized_gradients": True}},
        "zero_quantized_gradients",
    ),
    "bf16 clipped at stage 0": (
        {"head_dim_parallel": GRID, "bf16": {"enabled": True}, "gradient_clipping": 1.0},
        "bf16.*gradient_clipping 1.0.*stage to 1",
    ),
    "fp16 clipped at stage 0": (
        {"head_dim_parallel": GRID, "fp16": {"enabled": True}, "gradient_clipping": 1.0, "zero_optimization": {}},
        "fp16.*stage to 1",
    ),
    "stage 0 as a string": (
        {
            "head_dim_parallel": GRID,
            "bf16": {"enabled": True},
            "gradient_clipping": 1,
            "zero_optimization": {"stage": "0"},
        },
        "bf16.*stage to 1",
    ),
    "bf16 switched on by a string": (
        {"head_dim_parallel": GRID, "bf16": {"enabled": "true"}, "gradient_clipping": 1.0},
        "bf16.*stage to 1",
    ),
    "no stage": ({"head_dim_parallel": GRID, "zero_optimization": {"stage": 4}}, "zero_optimization.stage: .*got 4"),
    "stage a list": ({"head_dim_parallel": GRID, "zero_optimization": [1]}, r"must be an object, got \[1\]"),
    "clipping a string": (
        {"head_dim_parallel": GRID, "gradient_clipping": "1"},
        "must be a finite number of at least 0, got '1'",
    ),
    "bf16 no object": ({"head_dim_parallel": GRID, "bf16": True}, "bf16 must be an object, got True"),
    "Ulysses of one rank, as a mesh": (
        {"head_dim_parallel": GRID, "sequence_parallel_size": 1, "data_parallel_size": 2},
        "data_parallel_size 2.*leave",
    ),
}


@pytest.mark.parametrize(("settings", "words"), BAD.values(), ids=BAD.keys())
def test_refuses_in_words(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        head_dim_option(settings)


def test_half_precision_is_fine_at_stage_1_and_without_clipping() -> None:
    half = {"head_dim_parallel": GRID, "bf16": {"enabled": True}}
    assert head_dim_option(half | {"gradient_clipping": 1.0, "zero_optimization": {"stage": 1}}) is not None
    assert head_dim_option(half) is not None
    assert head_dim_option({"head_dim_parallel": GRID, "bf16": {"enabled": False}, "gradient_clipping": 1.0})


@pytest.mark.parametrize(
    "written",
    [
        {"bf16": {"enabled": True}, "zero_optimization": True},
        {"bf16": {"enabled": True}, "zero_optimization": {"stage": "1"}},
        {"bf16": {"enabled": "false"}, "zero_optimization": {"stage": 0}},
        {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2.0}},
        {"sequence_parallel_size": 1},
        {"zero_optimization": {"stage": 3, "zero_quantized_gradients": "false", "zero_hpz_partition_size": "1"}},
    ],
    ids=str,
)
def test_what_deepspeed_reads_as_fine_is_fine(written: dict[str, Any]) -> None:
    settings = {"head_dim_parallel": GRID, "gradient_clipping": 1.0} | written
    assert head_dim_option(settings) == HeadDimConfig(4, 2, "sequence")
    assert "allgather_size" not in settings


GIVEN = {"train": "train_batch_size", "micro": "train_micro_batch_size_per_gpu", "steps": "gradient_accumulation_steps"}


@pytest.mark.parametrize(
    ("sizes", "replicas"),
    [
        ({"train": 8}, 1),
        ({"train": 8}, 2),
        ({"micro": 2}, 2),
        ({"train": 8, "micro": 2}, 1),
        ({"train": 8, "micro": 2}, 2),
        ({"train": 8, "steps": 2}, 2),
        ({"micro": 2, "steps": 4}, 2),
        ({"train": 16, "micro": 2, "steps": 4}, 2),
    ],
    ids=str,
)
def test_the_third_batch_size_is_the_one_that_deepspeed_derives(sizes: dict[str, int], replicas: int) -> None:
    settings = {GIVEN[key]: value for key, value in sizes.items()}
    deepspeeds = SimpleNamespace(world_size=replicas, **{name: settings.get(name) for name in BATCH_KEYS})
    DeepSpeedConfig._set_batch_related_parameters(deepspeeds)
    assert batch_sizes(settings, replicas) == tuple(getattr(deepspeeds, name) for name in BATCH_KEYS)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "needs train_batch_size or train_micro_batch_size_per_gpu"),
        ({"train_batch_size": "auto"}, "train_batch_size must be a positive integer, got 'auto'"),
        ({"train_micro_batch_size_per_gpu": True}, "must be a positive integer, got True"),
        ({"train_batch_size": 9}, "9 is not .* = 4 × 1 × 2 = 8"),
        ({"train_batch_size": 8, "train_micro_batch_size_per_gpu": 3}, "8 is not .* = 3 × 1 × 2 = 6"),
        ({"train_batch_size": 1}, "1 is not .* = 0 × 1 × 2 = 0"),
    ],
    ids=str,
)
def test_batch_sizes_that_do_not_fit(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        batch_sizes(settings, 2)
