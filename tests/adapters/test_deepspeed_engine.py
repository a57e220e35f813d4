"""DeepSpeed's engine on a grid trains as Megatron's optimizer and as one rank do: ZeRO stages, precisions, DP = 2."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.adapters.deepspeed_cases import DeepSpeedCase, EngineOutcome, train
from tests.dist import gpt
from tests.dist.gpt_parts import assemble
from tests.ranks import Ranks

pytest.importorskip("deepspeed")

# 8 ranks: a 2 × 2 grid and two data-parallel copies, each with two micro-batches per step.
ADAM = DeepSpeedCase(steps=10, clip_grad=0.5)
# SGD moves in proportion to the gradient, so a wrong norm, factor or missing sum shows in the next loss; Adam hides it.
SGD = DeepSpeedCase(
    steps=4,
    clip_grad=0.3,
    settings={"optimizer": {"type": "SGD", "params": {"lr": 0.5}}, "zero_allow_untested_optimizer": True},
)
# bf16 keeps 8 bits: logits and gradients are good to 1/256, and ten steps of Adam on weights rounded that way leave the
# fp32 curve (4.7 down to 4.2) by up to 6e-3 under Megatron's own optimizer. A norm that missed the shards of one rank
# in four would be wrong by 10 % or more.
BF16_LOSS, BF16_NORM = 1.5e-2, 0.05


def on_one_rank(case: DeepSpeedCase) -> DeepSpeedCase:
    model = {name: value for name, value in case.model.items() if name != "sequence_parallel"}
    return replace(case, m=1, n=1, exchange="auto", order="dim-innermost", stage=0, model=model)


def largest_error(found: list[EngineOutcome], expected: dict[str, Any], tp: int) -> float:
    """The largest difference of any parameter, in units of its largest entry; replicas must agree bit for bit."""
    ours, theirs = assemble([one.params for one in found], tp), assemble([expected], 1)
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - whole).abs().max() / whole.abs().max()) for name, whole in theirs.items())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_fp32_equals_megatrons_optimizer_and_stock_on_one_rank(ranks: Ranks, stage: int) -> None:
    case = replace(ADAM, stage=stage)
    (stock,) = ranks.run(1, gpt.train, case.stock)
    megatron = ranks.run(8, gpt.train, case.megatron)[0]
    found = ranks.run(8, train, case)
    for one in found:
        assert one.losses == pytest.approx(stock.losses, abs=1e-4)
        assert one.losses == pytest.approx(megatron.losses, abs=1e-4)
        if stage:  # without ZeRO DeepSpeed keeps no norm in fp32
            assert one.grad_norms == pytest.approx(stock.grad_norms, rel=1e-4)
    assert largest_error(found, stock.params, 4) < 5e-3


SP = {"model": {"sequence_parallel": True, "qk_layernorm": True}}


@pytest.mark.parametrize(
    ("stage", "change"),
    [
        (0, {}),
        (0, SP),
        (1, SP),
        (2, SP),
        (3, SP),
        (1, {**SP, "order": "head-innermost"}),
        (2, {"m": 1, "n": 2, "exchange": "scores"}),
    ],
    ids=[
        "0",
        "0 SP QK-norm",
        "1 SP QK-norm",
        "2 SP QK-norm",
        "3 SP QK-norm",
        "1 SP head-innermost",
        "2 1x2 scores DP=2",
    ],
)
def test_clipped_sgd_equals_deepspeed_on_one_rank(ranks: Ranks, stage: int, change: dict[str, Any]) -> None:
    case = replace(SGD, stage=stage, **change)
    (alone,) = ranks.run(1, train, on_one_rank(case))
    found = ranks.run(4, train, case)
    assert alone.losses[-1] < alone.losses[0] - 0.05, "clipped so hard that nothing is compared"
    for one in found:
        assert one.losses == pytest.approx(alone.losses, abs=1e-5)
    assert largest_error(found, alone.params, case.m * case.n) < 2e-5


@pytest.mark.parametrize(("stage", "sequence_parallel"), [(1, False), (1, True), (2, True), (3, True)])
def test_bf16_follows_fp32_on_one_rank(ranks: Ranks, stage: int, sequence_parallel: bool) -> None:
    case = replace(ADAM, stage=stage, dtype=torch.bfloat16, model={"sequence_parallel": sequence_parallel})
    (stock,) = ranks.run(1, gpt.train, ADAM.stock)
    found = ranks.run(8, train, case)
    for one in found:
        assert one.losses == pytest.approx(stock.losses, abs=BF16_LOSS)
        assert one.grad_norms == pytest.approx(stock.grad_norms, rel=BF16_NORM)
    assemble([one.params for one in found], 4)  # raises where replicas differ in a single bit


def test_bf16_at_stage_0_without_clipping(ranks: Ranks) -> None:
    # At this stage DeepSpeed adds micro-batches up in bf16, so the reference is its own engine on one rank.
    case = replace(ADAM, dtype=torch.bfloat16, clip_grad=0.0)
    (alone,) = ranks.run(1, train, on_one_rank(case))
    for one in ranks.run(4, train, case):
        assert one.losses == pytest.approx(alone.losses, abs=BF16_LOSS)


def train_without_sums(case: DeepSpeedCase) -> EngineOutcome:
    """As `train`, with nobody summing the gradients of replicas."""
    from hp_plugin.deepspeed_adapter import engine

    summing = engine.sum_replica_gradients
    engine.sum_replica_gradients = lambda model, group: []
    try:
        return train(case)
    finally:
        engine.sum_replica_gradients = summing


def test_without_the_adapters_sums_replicas_drift_apart(ranks: Ranks) -> None:
    # What the tests above would miss if this did not fail: DeepSpeed alone never sums these gradients.
    found = ranks.run(4, train_without_sums, replace(SGD, model={"sequence_parallel": True}))
    with pytest.raises(AssertionError, match="differs within a TP group"):
        assemble([one.params for one in found], 4)
