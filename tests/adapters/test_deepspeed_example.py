"""The DeepSpeed example as it ships: every configuration is a valid one, and a mixture trains from its JSON alone."""

import argparse
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.adapters.deepspeed_cases import deepspeed_rank
from tests.adapters.moe_cases import deepspeed_forgotten
from tests.ranks import Ranks

pytest.importorskip("deepspeed")

FOLDER = Path(__file__).parents[2] / "examples" / "with_deepspeed"

pytestmark = [
    pytest.mark.filterwarnings("ignore:When using expert parallelism and tensor parallelism:UserWarning:megatron"),
]


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pretrain_gpt_deepspeed", FOLDER / "pretrain_gpt_deepspeed.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def settings_in(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / name).read_text())


@pytest.mark.parametrize(
    ("name", "world_size"),
    [
        ("ds_config_dense.json", 16),
        ("ds_config_moe.json", 16),
        ("ds_config_dense_cpu.json", 8),
        ("ds_config_moe_cpu.json", 8),
    ],
)
def test_every_configuration_is_valid(monkeypatch: pytest.MonkeyPatch, name: str, world_size: int) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    example = script()
    config = example.read_config(settings_in(name), world_size)
    built = example.build_transformer_config(config)
    assert built.tensor_model_parallel_size == config.head_dim.size
    assert built.num_moe_experts == (8 if "moe" in name else None)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"gpt": {"moe_backend": "megatron"}}, '"moe_backend": "deepspeed" only'),
        ({"zero_optimization": {"stage": 3}}, "set zero_optimization.stage to 1 or 2"),
        ({"gpt": {"num_expert": 8}}, "unknown key 'num_expert'; did you mean num_experts"),
        ({"gpt": {"position_embedding_type": "rotary"}}, "must be one of learned_absolute, rope, none, got 'rotary'"),
        ({"gpt": {"swiglu": "false"}}, "--swiglu must be true or false, got 'false'"),
        ({"gpt": {"hidden_size": "auto"}}, "--hidden-size must be an integer, got 'auto'"),
        ({"gpt": {"hidden_size": None}}, "--hidden-size must be an integer, got None"),
        ({"gpt": {"micro_batch_size": 4}}, '"gpt" cannot say micro_batch_size'),
        ({"zero_optimization": {"stage": "3"}}, "set zero_optimization.stage to 1 or 2"),
        ({"optimizer": {"params": {"lr": "auto"}}}, "--lr must be a number, got 'auto'"),
        ({"optimizer": {"params": None}, "gpt": {"lr": 1.0}}, '"gpt" cannot say lr'),
    ],
    ids=lambda value: str(value)[:50],
)
def test_refuses_in_words(change: dict[str, Any], said: str) -> None:
    settings = settings_in("ds_config_moe_cpu.json")
    for key, value in change.items():
        settings[key] |= value
    if "moe_backend" in str(change):
        settings["gpt"]["sequence_parallel"] = True
    with pytest.raises(ValueError, match=said):
        script().read_config(settings, 8)


@pytest.mark.parametrize(
    ("sizes", "sequences", "micro_batch"),
    [
        ({"train_batch_size": 8}, 8, 4),
        ({"train_batch_size": 8, "gradient_accumulation_steps": 2}, 8, 2),
        ({"train_micro_batch_size_per_gpu": 3}, 6, 3),
    ],
    ids=str,
)
def test_batch_sizes_left_out_are_derived(sizes: dict[str, int], sequences: int, micro_batch: int) -> None:
    settings = settings_in("ds_config_dense_cpu.json") | sizes
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        if key not in sizes:
            settings.pop(key, None)
    # By hand: a 2 × 2 grid on 8 ranks has two replicas.
    config = script().read_config(settings, 8)
    assert (config.batch_size(8), config.micro_batch_size) == (sequences, micro_batch)


def pretrain(settings: dict[str, Any]) -> list[float]:
    """The losses of the example's own loop."""
    example = script()
    options = argparse.Namespace(load=None, save=None, load_weights=None, save_weights=None)
    with deepspeed_forgotten(), deepspeed_rank():
        config = example.read_config(settings, 8)
        return example.pretrain(options, settings, config)


def test_a_mixture_trains_from_its_configuration_alone(ranks: Ranks) -> None:
    settings = settings_in("ds_config_moe_cpu.json")
    settings["gpt"] |= {"train_iters": 3, "mock_data": True}
    found = ranks.run(8, pretrain, settings)
    assert all(losses == found[0] for losses in found)
    assert found[0][-1] < found[0][0]
