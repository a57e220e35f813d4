"""The reference trainer with four ranks on one GPU: streams of dropout, mixtures, checkpoints to and from the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.dist.attention_cases import Case
from tests.dist.test_attention_features import dropout_masks
from tests.dist.training_runs import train
from tests.gpu.rehearsal import marked
from tests.ranks import Ranks

ROOT = Path(__file__).parents[2]
GLOO = "--distributed-backend gloo --train-iters 6"
MIXTURE = "--num-experts 4 --moe-router-topk 1 --moe-router-pre-softmax"
GRID = "--head-dim-parallel 2,2"
SP = "--sequence-parallel"

# name: (on both sides, the layout)
RUNS = {
    "batch": ("", GRID),
    "weights, SP": ("", f"{GRID} --head-dim-exchange weights {SP}"),
    "scores, selective recompute": ("--recompute-activations", f"{GRID} --head-dim-exchange scores"),
    "sequence, PP": ("", "--head-dim-parallel 1,2 --head-dim-exchange sequence --pipeline-model-parallel-size 2"),
    "fused core": ("--attention-backend fused --num-query-groups 2", GRID),
    "Megatron's mixture": (MIXTURE, f"{GRID} {SP}"),
    "DeepSpeed's mixture": (f"{MIXTURE} --moe-backend deepspeed", f"{GRID} --expert-model-parallel-size 4"),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("run", marked(RUNS, "fused core"))
def test_losses_of_one_rank(ranks: Ranks, cache: str, run: tuple[str, str]) -> None:
    both, layout = run
    if "deepspeed" in both and find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    expected, _ = ranks.run(1, train, cache, f"{both} {GLOO}")[0]
    found, _ = ranks.run(4, train, cache, f"{both} {layout} {GLOO}")[-1]
    assert len(found) == 6 and found == pytest.approx(expected, abs=1e-4, rel=0)


@pytest.mark.parametrize("recompute", marked({"again": "", "recompute": "--recompute-activations"}, "recompute"))
@pytest.mark.parametrize("backend", marked({name: name for name in ("unfused", "fused")}, "fused"))
def test_dropout_repeats_and_does_not_depend_on_recompute(
    ranks: Ranks, cache: str, backend: str, recompute: str
) -> None:
    flags = f"{GRID} {GLOO} --attention-dropout 0.3 --hidden-dropout 0.1 --attention-backend {backend}"
    first, _ = ranks.run(4, train, cache, flags)[-1]
    again, _ = ranks.run(4, train, cache, f"{flags} {recompute}")[-1]
    whole, _ = ranks.run(4, train, cache, f"{GRID} {GLOO} --attention-backend {backend}")[-1]
    assert again == pytest.approx(first, abs=1e-5, rel=0)
    assert whole != pytest.approx(first, abs=1e-3, rel=0)


@pytest.mark.kept
def test_a_dim_group_drops_the_same_scores_and_a_head_group_does_not(ranks: Ranks) -> None:
    masses = dict(ranks.run(4, dropout_masks, Case(2, 2, "scores", d=8, s=40, b=2, config={"attention_dropout": 0.3})))
    for i in (0, 1):
        torch.testing.assert_close(masses[i, 0], masses[i, 1], rtol=0, atol=0)
    assert not torch.equal(masses[0, 0], masses[1, 0])


def pretrain(cache: str, losses: Path, on_cpu: bool, flags: str) -> dict[str, float]:
    """{iteration: loss} of a run of its own, with or without the GPU."""
    model = (
        "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --micro-batch-size 4 --lr 3e-3 "
        "--global-batch-size 8 --attention-dropout 0 --hidden-dropout 0 --seed 1 --distributed-backend gloo"
    )
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    command += ["examples/pretrain_gpt.py", *model.split(), *flags.split(), "--data-cache-path", cache]
    done = subprocess.run(
        [*command, "--loss-file", str(losses)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, float] = json.loads(losses.read_text("utf-8"))
    return found


@pytest.mark.parametrize("saved_on_cpu", marked({"to the CPU": False, "from the CPU": True}, "to the CPU"))
def test_a_checkpoint_goes_on_elsewhere(tmp_path: Path, cache: str, saved_on_cpu: bool) -> None:
    grid, other = f"{GRID} --train-iters 6", "--head-dim-parallel 1,4 --train-iters 6"
    through = pretrain(cache, tmp_path / "through.json", saved_on_cpu, grid)
    pretrain(
        cache, tmp_path / "half.json", saved_on_cpu, f"{GRID} --train-iters 6 --exit-interval 3 --save {tmp_path}/saved"
    )
    found = pretrain(cache, tmp_path / "on.json", not saved_on_cpu, f"{other} --load {tmp_path}/saved")
    assert list(found) == ["4", "5", "6"]
    assert found == pytest.approx({name: through[name] for name in found}, abs=1e-4, rel=0)
