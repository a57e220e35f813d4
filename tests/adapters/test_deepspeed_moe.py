"""Mixtures of experts under DeepSpeed's engine on a grid train as DeepSpeed-MoE does on one rank, and resume."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.adapters.deepspeed_moe_cases import (
    MixtureCase,
    move_weights,
    refusal,
    save_and_resume,
    train_mixture,
    whole,
)
from tests.ranks import Ranks

pytest.importorskip("deepspeed")

pytestmark = [
    pytest.mark.filterwarnings("ignore:When using expert parallelism and tensor parallelism:UserWarning:megatron"),
]

SP = {"sequence_parallel": True}
BF16_LOSS = 3e-2
# SGD moves in proportion to the gradient: a missing sum, a factor or a wrong norm shows in every parameter at once.
CASE = MixtureCase(
    steps=3,
    clip_grad=1.0,
    settings={"optimizer": {"type": "SGD", "params": {"lr": 0.3}}, "zero_allow_untested_optimizer": True},
)


def alone(case: MixtureCase) -> MixtureCase:
    model = {name: value for name, value in case.model.items() if name != "sequence_parallel"}
    return replace(case, m=1, n=1, ep=1, etp=1, stage=0, dtype=torch.float32, model=model)


@pytest.mark.parametrize(
    ("world", "case"),
    [
        (4, CASE),
        (4, replace(CASE, stage=1, ep=2, model=SP)),
        (8, replace(CASE, stage=2, experts=8, ep=8, k=2, model=SP)),
        (8, replace(CASE, stage=1, ep=2, etp=4, bias=False)),
    ],
    ids=["0", "1 EP within the grid, SP", "2 EP across DP, SP", "1 expert TP"],
)
def test_trains_as_one_rank_does(ranks: Ranks, world: int, case: MixtureCase) -> None:
    (expected,) = ranks.run(1, train_mixture, alone(case))
    found = ranks.run(world, train_mixture, case)
    for one in found:
        assert one.losses == pytest.approx(expected.losses, abs=1e-5)
        assert one.balance == pytest.approx(expected.balance, abs=1e-5)
    (start,) = ranks.run(1, train_mixture, replace(alone(case), steps=0))
    before, ours, theirs = whole([start]), whole(found), whole([expected])
    assert ours.keys() == theirs.keys() == before.keys()
    for name, due in theirs.items():
        # In units of what training changed: an expert's gradient is small beside its weights.
        moved = float((due - before[name]).abs().max())
        assert moved > 1e-4, f"{name} was hardly trained"
        assert float((ours[name] - due).abs().max()) < 1e-3 * moved + 1e-7, name


@pytest.mark.slow
def test_bf16_follows_fp32_on_one_rank(ranks: Ranks) -> None:
    # Ten steps of Adam; bf16 keeps 8 bits, and a token near the border between two experts may change sides.
    case = replace(CASE, steps=10, stage=1, ep=2, model=SP, settings={})
    (expected,) = ranks.run(1, train_mixture, alone(case))
    exact = ranks.run(4, train_mixture, case)
    for one in exact:
        assert one.losses == pytest.approx(expected.losses, abs=1e-4)
    for one in ranks.run(4, train_mixture, replace(case, dtype=torch.bfloat16)):
        assert one.losses == pytest.approx(expected.losses, abs=BF16_LOSS)
        assert one.losses != exact[0].losses
    assert expected.losses[-1] < expected.losses[0] - 10 * BF16_LOSS


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize(
    ("world", "case"),
    [
        (4, replace(CASE, clip_grad=0.0, ep=2)),
        (8, replace(CASE, stage=1, dtype=torch.bfloat16, ep=2, model=SP)),
        (8, replace(CASE, stage=2, experts=8, ep=8, k=2)),
    ],
    ids=["0 fp32", "1 bf16", "2 fp32 EP across DP"],
)
def test_deepspeeds_own_checkpoint_resumes_bit_equal(
    ranks: Ranks, tmp_path: Path, world: int, case: MixtureCase
) -> None:
    case = replace(case, settings={})  # Adam, for the sake of its state
    for straight, resumed in ranks.run(world, save_and_resume, case, str(tmp_path)):
        assert resumed.losses == straight.losses
        assert resumed.grad_norms == straight.grad_norms
        for name, (tensor, _, _) in straight.parts.items():
            assert torch.equal(resumed.parts[name][0], tensor), name


# Megatron's MoE says it of every expert.
@pytest.mark.filterwarnings("ignore:`sequence_parallel` is set to `True`:UserWarning:megatron")
@pytest.mark.parametrize(
    ("case", "scenario", "said"),
    [
        (replace(CASE, stage=3), "", "ZeRO stage 3 cannot split DeepSpeed-MoE's experts"),
        (replace(CASE, ep=2), "", "4 tensor-parallel ranks there, but 2 ranks share the experts"),
        (
            replace(CASE, stage=2, settings={"zero_optimization": {"stage": 2, "reduce_scatter": False}}),
            "",
            "zero_optimization.reduce_scatter false",
        ),
        (replace(CASE, model=SP, bias=False), "Megatron's", "build it with deepspeed_moe_spec"),
    ],
    ids=["ZeRO-3", "stage 0 clipping", "reduce_scatter", "Megatron's MoE"],
)
def test_refuses_in_words(ranks: Ranks, case: MixtureCase, scenario: str, said: str) -> None:
    for found in ranks.run(4, refusal, case, scenario):
        assert said in found


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_weights_move_to_another_grid_and_expert_group(ranks: Ranks, tmp_path: Path) -> None:
    saved, loaded = replace(CASE, stage=1, ep=2), replace(CASE, m=1, n=2, ep=4)
    found = ranks.run(4, move_weights, saved, loaded, str(tmp_path / "weights"))
    theirs, ours = whole([one for one, _ in found]), whole([one for _, one in found])
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
