"""Megatron-LM's own, unmodified pretrain_gpt.py through the launcher, on the grid, against itself on one rank."""

from __future__ import annotations

from pathlib import Path

import pytest

from hp_plugin.commands import main as cli
from hp_plugin.megatron_lm.releases import listed_releases
from hp_plugin.planner.inputs.layout import Layout
from hp_plugin.planner.inputs.model_shape import ModelShape
from hp_plugin.planner.inputs.workload import Workload
from hp_plugin.planner.machine.hardware import load_hardware
from hp_plugin.planner.search.launch_flags import megatron_flags
from hp_plugin.planner.seconds.step import predict
from tests.adapters.megatron_lm_runs import LINE, losses, needs_clone, release_tree, run

pytestmark = [needs_clone, pytest.mark.slow, pytest.mark.timeout(1800)]

GQA = "--group-query-attention --num-query-groups"
LLAMA = "--normalization RMSNorm --swiglu --untie-embeddings-and-output-weights --disable-bias-linear"
CASES = {
    "MHA": ("", "--head-dim-parallel 2,2"),
    "one key/value head": (f"{GQA} 1", "--head-dim-parallel 1,4"),
    "two heads": ("--num-attention-heads 2", "--head-dim-parallel 2,2"),
    "PP=2": ("", "--head-dim-parallel 1,2 --pipeline-model-parallel-size 2"),
    "interleaved": (
        "--num-layers 4",
        "--head-dim-parallel 1,2 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
    ),
    "sequence parallel, Llama's layer": (LLAMA, "--head-dim-parallel 2,2 --sequence-parallel"),
    "distributed optimizer": (
        "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable",
        "--head-dim-parallel 1,2",
    ),
    "QK-norm, recomputed, scores": (
        f"{GQA} 2 --qk-layernorm",
        "--head-dim-parallel 2,2 --head-dim-exchange scores --recompute-granularity full --recompute-method uniform "
        "--recompute-num-layers 1",
    ),
    "auto, multi-token prediction": (
        f"{GQA} 2 --mtp-num-layers 1",
        "--head-dim-parallel auto --tensor-model-parallel-size 4",
    ),
    "weights, interleaved, sequence parallel": (
        f"{LLAMA} --num-layers 4",
        "--head-dim-parallel 1,2 --head-dim-exchange weights --pipeline-model-parallel-size 2 "
        "--num-layers-per-virtual-pipeline-stage 1 --sequence-parallel",
    ),
    "weights by tokens, multi-token prediction": (
        f"{GQA} 2 --mtp-num-layers 1",
        "--head-dim-parallel 1,4 --head-dim-exchange weights",
    ),
    "weights, distributed optimizer": (
        "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable",
        "--head-dim-parallel 1,2 --head-dim-exchange weights --overlap-grad-reduce --overlap-param-gather",
    ),
    "--spec": (
        "--spec spec_of_ours layer",
        "--head-dim-parallel 1,4 --head-dim-exchange sequence",
    ),
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return release_tree("core_v0.16.1", tmp_path_factory.mktemp("core_v0.16.1"))


def require_same_curve(stock: dict[int, float], grid: dict[int, float]) -> None:
    """Stock ran from iteration 1, the grid from 2: each prints a mean of two as its second loss, then the losses."""
    assert sorted(stock) == [1, 2, 3, 4, 5, 6, 7] and sorted(grid) == [2, 3, 4, 5, 6, 7]
    for iteration in (4, 5, 6, 7):
        assert grid[iteration] == pytest.approx(stock[iteration], abs=1e-4)
    assert stock[7] < stock[4]


@pytest.mark.parametrize(("model", "layout"), CASES.values(), ids=CASES.keys())
def test_the_grid_goes_on_from_stock_on_the_same_curve(tree: Path, tmp_path: Path, model: str, layout: str) -> None:
    # Both from one stock checkpoint, made without the plugin: Megatron-LM's initial weights depend on the layout.
    stock = losses(tree, 1, f"{model} --save {tmp_path} --save-interval 1", launcher=False)
    grid = losses(tree, 4, f"{model} {layout} --load {tmp_path} --ckpt-step 1")
    require_same_curve(stock, grid)


@pytest.mark.parametrize(
    "layout",
    [
        "tp=2,pp=2,mbs=1",
        "grid=2x2,exchange=batch,mbs=2",
        "grid=1x2,exchange=sequence,dp=2,mbs=1,sp,recompute=full",
        "tp=1,dp=4,mbs=1,zero=replicated",
    ],
)
def test_the_flags_that_the_planner_prints_run_as_printed(tree: Path, layout: str) -> None:
    model = ModelShape("tiny", 2, 32, 4, 2, 8, 48, vocab=4095, gated=True, norm_biases=False)
    wanted = Layout.parse(layout, 4)
    found = predict(model, wanted, Workload("train", 16, 4), load_hardware("h100-ib"))
    status, output = run(tree, 4, " ".join(megatron_flags(found)), launcher=wanted.grid is not None)
    assert status == 0, output[-6000:]
    said = [float(line[2]) for line in map(LINE.search, output.splitlines()) if line]
    assert len(said) == 7 and said[-1] < said[0]
    assert f"tensor-model-parallel size: {wanted.tp}" in output
    assert f"pipeline-model-parallel size: {wanted.pp}" in output


def test_interrupted_and_resumed_on_the_grid(tree: Path, tmp_path: Path) -> None:
    flags = "--head-dim-parallel 2,2"
    whole = losses(tree, 4, flags)
    first = losses(tree, 4, f"{flags} --save {tmp_path} --save-interval 3 --exit-interval 3")
    second = losses(tree, 4, f"{flags} --load {tmp_path}")
    assert sorted(first) == [1, 2, 3] and sorted(second) == [4, 5, 6, 7]
    assert sorted(whole) == [1, 2, 3, 4, 5, 6, 7]
    del second[5]  # the mean of two
    assert first | second == {iteration: loss for iteration, loss in whole.items() if iteration != 5}


def test_what_a_checkpoint_cannot_be_loaded_as(tree: Path, tmp_path: Path) -> None:
    local = "--head-dim-parallel 2,2 --head-dim-exchange local --train-iters 1"
    losses(tree, 4, f"{local} --save {tmp_path} --save-interval 1")
    load = f"--load {tmp_path} --train-iters 2 --override-opt-param-scheduler"
    for flags, words in (
        ("--head-dim-parallel 2,2", "would compute another function"),
        (f"{local} --ffn-hidden-size 64", "mlp.linear_fc1.weight is ("),
    ):
        status, output = run(tree, 4, f"{flags} {load}")
        assert status != 0 and words in output, output[-3000:]
    assert sorted(losses(tree, 4, f"--head-dim-parallel 2,2 --head-dim-allow-other-function {load}")) == [2]
    shard = max((tmp_path / "iter_0000001").glob("*.distcp"), key=lambda file: file.stat().st_size)
    shard.write_bytes(shard.read_bytes()[:100])
    status, output = run(tree, 4, f"{local} {load}")
    assert status != 0 and f"{shard} is truncated" in output, output[-3000:]


def test_contradicting_flags_end_before_training(tree: Path) -> None:
    for flags, words in (
        ("--head-dim-parallel 2,2 --tensor-model-parallel-size 2", "--tensor-model-parallel-size 2"),
        ("--head-dim-parallel 4,4", "16"),
        ("--head-dim-parallel 4,1 --num-attention-heads 2 --kv-channels 16", "2"),
        ("--head-dim-parallel 2x2", "2x2"),
    ):
        status, output = run(tree, 4, flags)
        (said,) = [line for line in output.splitlines() if "pretrain_gpt.py: error:" in line]
        assert status != 0 and "head-dim-parallel" in said and words in said
        assert "building GPT model" not in output


def test_without_the_flag_nothing_changes(tree: Path) -> None:
    layout = "--tensor-model-parallel-size 2"
    assert losses(tree, 2, layout) == losses(tree, 2, layout, launcher=False)


@pytest.mark.parametrize("tag", dict.fromkeys(row.tree for row in listed_releases() if row.tree))
def test_a_patched_tree_needs_no_launcher(tmp_path: Path, tag: str) -> None:
    patched = release_tree(tag, tmp_path / "tree")
    untouched = losses(patched, 1, f"--save {tmp_path}/checkpoints --save-interval 1", launcher=False)
    assert cli.main(["patch", str(patched)]) == 0
    assert losses(patched, 1, "", launcher=False) == untouched
    grid = losses(patched, 4, f"--head-dim-parallel 2,2 --load {tmp_path}/checkpoints --ckpt-step 1", launcher=False)
    require_same_curve(untouched, grid)
