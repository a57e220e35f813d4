"""Optimizer state of experts moves between layouts that keep it alike, and is refused by the others in words."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from hp_plugin.training.checkpoints.saving import Checkpoints
from hp_plugin.training.distributed import running_ranks
from hp_plugin.training.step import build_trainer
from tests.adapters.moe_cases import deepspeed_forgotten
from tests.adapters.test_checkpoint_resume import refused, train_saving, writing_files
from tests.dist.training_runs import configured, example
from tests.ranks import Ranks

pytestmark = [
    pytest.mark.filterwarnings("ignore:When using expert parallelism and tensor parallelism:UserWarning:megatron"),
    pytest.mark.filterwarnings("ignore:`sequence_parallel` is set to `True`:UserWarning:megatron"),
    # What saving and loading says by itself in torch 2.13.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
]
RUN = (
    "--mock-data --num-layers 1 --num-experts 4 --moe-router-topk 2 --disable-bias-linear --use-distributed-optimizer "
    "--head-dim-parallel 1,2 --sequence-parallel"
)
WHOLE = "--expert-model-parallel-size 1 --expert-tensor-parallel-size 1"
SPREAD = "--expert-model-parallel-size 2 --expert-tensor-parallel-size 1"
SPLIT = "--expert-model-parallel-size 1 --expert-tensor-parallel-size 2"


def load_and_save(cache: str, flags: str) -> None:
    """Loads a checkpoint and saves it again, with no step between."""
    config = configured(cache, flags)
    transformer_config = example().check(config)
    with running_ranks(config) as device, writing_files():
        checkpoints = Checkpoints(build_trainer(config, transformer_config, device))
        iteration = checkpoints.load()
        checkpoints.save(iteration)


def moves(cache: str, path: str) -> dict[str, str]:
    """What is said, on this rank, of loading experts on other groups than saved them."""
    with deepspeed_forgotten():
        for name, experts in (("whole", WHOLE), ("split", SPLIT)):
            train_saving(cache, f"{RUN} {experts} --train-iters 2 --save {path}/{name}")
        again = f"{RUN} --train-iters 3"
        return {
            "whole to split": refused(cache, f"{again} {SPLIT} --load {path}/whole"),
            "split to whole": refused(cache, f"{again} {WHOLE} --load {path}/split"),
            "its weights": refused(cache, f"{RUN} --train-iters 1 {WHOLE} --finetune --load {path}/split"),
            "split to DeepSpeed's": refused(cache, f"{again} {SPLIT} --moe-backend deepspeed --load {path}/split"),
        }


def test_optimizers_that_keep_experts_otherwise_are_refused_with_the_layouts(ranks: Ranks, tmp_path: Path) -> None:
    both = ranks.run(2, moves, str(tmp_path), str(tmp_path))
    assert both[0] == both[1]
    said = both[0]
    apart, together = "have an optimizer of their own", "share one with all other weights"
    assert (
        f"experts {apart} there (TP 2, EP 1, expert TP 1), and {together} here (TP 2, EP 1, expert TP 2)"
        in (said["whole to split"])
    )
    assert "it loads with --expert-model-parallel-size above 1, --expert-tensor" in said["whole to split"]
    assert f"experts {together} there (TP 2, EP 1, expert TP 2), and {apart} here" in said["split to whole"]
    assert "it loads with Megatron's experts, --expert-model-parallel-size 1 and" in said["split to whole"]
    assert f"{together} there" in said["split to DeepSpeed's"]
    assert said["its weights"] == "loaded"


def moved(cache: str, path: str) -> None:
    with deepspeed_forgotten():
        train_saving(cache, f"{RUN} {WHOLE} --train-iters 2 --save {path}/first")
        load_and_save(cache, f"{RUN} {SPREAD} --load {path}/first --save {path}/second")


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole."""
    state: dict[str, torch.Tensor] = {}
    reader = FileSystemReader(folder / "iter_0000002")
    _load_state_dict(state, storage_reader=reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def test_optimizers_that_keep_experts_alike_take_every_bit(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(2, moved, str(tmp_path), str(tmp_path))
    first, second = (stored(tmp_path / name) for name in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    moments = [name for name in first if "exp_avg" in name and "experts" in name]
    assert len(moments) == 4 and all(first[name].any() for name in moments)
