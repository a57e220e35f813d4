"""Exchange `weights` under DeepSpeed's engine, and with both mixtures of experts, beside one rank."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hp_plugin.attention.transformer_config import HeadDimMLATransformerConfig
from tests.adapters import deepspeed_cases
from tests.adapters import test_deepspeed_engine as engine
from tests.adapters.deepspeed_cases import DeepSpeedCase, deepspeed_rank, start_engine, train
from tests.adapters.test_moe_backends import MIXTURE, losses_of
from tests.dist import test_latent_attention as latent_attention
from tests.ranks import Ranks

pytest.importorskip("deepspeed")
pytestmark = [
    pytest.mark.filterwarnings("ignore:When using expert parallelism and tensor parallelism:UserWarning:megatron"),
    pytest.mark.filterwarnings("ignore:`sequence_parallel` is set to `True`:UserWarning:megatron"),
]

SP = {"sequence_parallel": True, "qk_layernorm": True}


@pytest.mark.parametrize(
    ("stage", "change"),
    [(0, {}), (1, {"model": SP}), (2, {}), (2, {"model": SP}), (1, {"m": 1, "n": 2}), (2, {"m": 1, "n": 4})],
    ids=["0", "1 SP QK-norm", "2", "2 SP QK-norm", "1 1x2 DP=2", "2 1x4 tokens"],
)
def test_clipped_sgd_equals_deepspeed_on_one_rank(ranks: Ranks, stage: int, change: dict[str, Any]) -> None:
    case = replace(engine.SGD, exchange="weights", stage=stage, **change)
    (alone,) = ranks.run(1, train, engine.on_one_rank(case))
    found = ranks.run(4, train, case)
    for one in found:
        assert one.losses == pytest.approx(alone.losses, abs=1e-5)
    assert engine.largest_error(found, alone.params, case.m * case.n) < 2e-5


def train_latent(case: DeepSpeedCase) -> Any:
    """`train` of a model with multi-latent attention."""
    kept = deepspeed_cases.layer_spec, deepspeed_cases.HeadDimTransformerConfig
    deepspeed_cases.layer_spec = latent_attention.layer_spec
    deepspeed_cases.HeadDimTransformerConfig = HeadDimMLATransformerConfig  # type: ignore[misc]
    try:
        return train(case)
    finally:
        deepspeed_cases.layer_spec, deepspeed_cases.HeadDimTransformerConfig = kept  # type: ignore[misc]


@pytest.mark.parametrize("change", [{}, {"sequence_parallel": True}], ids=["2", "2 SP"])
def test_latent_attention_equals_deepspeed_on_one_rank(ranks: Ranks, change: dict[str, Any]) -> None:
    latent = {name: value for name, value in latent_attention.LATENT.items() if not name.startswith("num_")}
    case = replace(engine.SGD, exchange="weights", stage=2, model=latent | change)
    (alone,) = ranks.run(1, train_latent, engine.on_one_rank(case))
    found = ranks.run(4, train_latent, case)
    for one in found:
        assert one.losses == pytest.approx(alone.losses, abs=1e-5)
    assert engine.largest_error(found, alone.params, 4) < 2e-5


def test_bf16_follows_fp32_on_one_rank(ranks: Ranks) -> None:
    case = replace(engine.ADAM, exchange="weights", stage=2, dtype=torch.bfloat16)
    (alone,) = ranks.run(1, train, engine.on_one_rank(replace(engine.ADAM, stage=0)))
    for one in ranks.run(8, train, case):
        assert one.losses == pytest.approx(alone.losses, abs=engine.BF16_LOSS)


def refused(case: DeepSpeedCase) -> str:
    with deepspeed_rank():
        try:
            start_engine(case)
        except ValueError as mistake:
            return str(mistake)
    return "started"


def test_stage_3_is_refused_in_words(ranks: Ranks) -> None:
    for said in ranks.run(4, refused, DeepSpeedCase(exchange="weights", stage=3)):
        assert "zero_optimization.stage 3" in said and "stage to 0, 1 or 2" in said


# Ranks, flags of the model, flags of the layout.
GRIDS = {
    "samples": (4, "", ""),
    "tokens": (4, "--micro-batch-size 1", ""),
    "dense layers between": (4, "--num-layers 4 --moe-layer-freq 2", ""),
    "PP=2": (8, "", "--pipeline-model-parallel-size 2"),
    "recomputed": (4, "", "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"),
}
PER_BACKEND = {
    "megatron": "--sequence-parallel --expert-model-parallel-size 4 --expert-tensor-parallel-size 1",
    "megatron, experts cut": "--sequence-parallel",
    "deepspeed": "--expert-model-parallel-size 4 --expert-tensor-parallel-size 1",
    "deepspeed, SP": "--sequence-parallel --expert-model-parallel-size 4 --expert-tensor-parallel-size 1",
}


@pytest.mark.parametrize("layout", PER_BACKEND)
@pytest.mark.parametrize("grid", GRIDS)
def test_mixtures_train_as_one_rank(ranks: Ranks, tmp_path: Path, grid: str, layout: str) -> None:
    world_size, model, flags = GRIDS[grid]
    ((expected, _),) = ranks.run(1, losses_of, str(tmp_path), f"{MIXTURE} {model} --moe-backend deepspeed")
    flags = f"{flags} {PER_BACKEND[layout]} --moe-backend {layout.split(',')[0]}"
    flags = f"{MIXTURE} {model} --head-dim-parallel 2,2 --head-dim-exchange weights {flags}"
    found, _ = ranks.run(world_size, losses_of, str(tmp_path), flags)[-1]
    assert found == pytest.approx(expected, abs=1e-4)
