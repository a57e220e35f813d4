"""Megatron-LM's own, unmodified pretrain_gpt.py through the launcher, on the grid, against itself on one rank."""

from __future__ import annotations

import atexit
import shutil
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch

from hp_plugin.commands import main as cli
from hp_plugin.megatron_lm.releases import listed_releases
from hp_plugin.planner.inputs.layout import Layout
from hp_plugin.planner.inputs.model_shape import ModelShape
from hp_plugin.planner.inputs.workload import Workload
from hp_plugin.planner.machine.hardware import load_hardware
from hp_plugin.planner.search.launch_flags import megatron_flags
from hp_plugin.planner.seconds.step import predict
from tests.adapters.megatron_lm_runs import LINE, losses, needs_clone, release_tree, run
from tests.adapters.test_flags import Hostile

pytestmark = [needs_clone, pytest.mark.slow, pytest.mark.timeout(1800)]

GQA = "--group-query-attention --num-query-groups"
LLAMA = "--normalization RMSNorm --swiglu --untie-embeddings-and-output-weights --disable-bias-linear"
RECOMPUTED = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
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
        f"--head-dim-parallel 2,2 --head-dim-exchange scores {RECOMPUTED}",
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
    "weights, multi-token prediction, recomputed": (
        f"{GQA} 2 --mtp-num-layers 1 --micro-batch-size 4",
        f"--head-dim-parallel 2,2 --head-dim-exchange weights {RECOMPUTED}",
    ),
    # Of 4 samples weights move.
    "auto, multi-token prediction, recomputed, evaluated": (
        f"{GQA} 2 --mtp-num-layers 1 --micro-batch-size 4 --eval-iters 1 --eval-interval 2",
        f"--head-dim-parallel 2,2 {RECOMPUTED}",
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


LATENT = (
    "--multi-latent-attention --q-lora-rank 24 --kv-lora-rank 16 --qk-head-dim 12 --qk-pos-emb-head-dim 4 "
    "--v-head-dim 10 --num-attention-heads 2 --qk-layernorm --normalization RMSNorm --disable-bias-linear"
)


# DeepSpeed drops what comes last beyond an expert's capacity and Megatron what is least wanted: their losses differ.
MIXTURE = (
    "--disable-bias-linear --num-experts 4 --moe-router-topk 2 --moe-aux-loss-coeff 1e-2 "
    "--moe-token-dispatcher-type alltoall --moe-expert-capacity-factor 1.0"
)
ON_EXPERTS = "--head-dim-parallel 2,2 --expert-model-parallel-size 4 --expert-tensor-parallel-size 1"

HERE = "{}.{}".format(*sys.version_info[:2])
WHOLE = (
    "core_v0.16.1" if sys.version_info < (3, 12) else "core_v0.19.0"
)  # of the release that is pinned for this Python
TREES = list(dict.fromkeys([WHOLE, *(row.tree for row in listed_releases() if row.tree and row.python == HERE)]))


@cache
def tree_of(tag: str) -> Path:
    """A release's tree, made once."""
    folder = Path(tempfile.mkdtemp(prefix=tag))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return release_tree(tag, folder)


@pytest.fixture
def tree() -> Path:
    return tree_of(WHOLE)


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


@pytest.mark.parametrize("layout", ["2,2 --head-dim-exchange weights --sequence-parallel", "1,4"])
def test_multi_latent_attention_goes_on_from_stock_on_the_same_curve(tree: Path, tmp_path: Path, layout: str) -> None:
    plain = f"{LATENT} --spec spec_of_ours latent --save {tmp_path} --save-interval 1"
    stock = losses(tree, 1, plain, launcher=False)
    require_same_curve(stock, losses(tree, 4, f"{LATENT} --head-dim-parallel {layout} --load {tmp_path} --ckpt-step 1"))


@pytest.mark.parametrize("case", ["MHA", "one key/value head", "PP=2", "distributed optimizer"])
@pytest.mark.parametrize("tag", TREES[1:])
def test_so_it_does_on_the_other_releases(tag: str, case: str, tmp_path: Path) -> None:
    model, layout = CASES[case]
    stock = losses(tree_of(tag), 1, f"{model} --save {tmp_path} --save-interval 1", launcher=False)
    require_same_curve(stock, losses(tree_of(tag), 4, f"{model} {layout} --load {tmp_path} --ckpt-step 1"))


@pytest.mark.parametrize("tag", TREES)
def test_the_mixtures_are_the_backends_that_the_flag_names(tag: str, tmp_path: Path) -> None:
    there, tree = "--moe-backend deepspeed", tree_of(tag)
    ours = losses(tree, 1, f"{MIXTURE} {there} --save {tmp_path} --save-interval 1")
    grid = losses(tree, 4, f"{MIXTURE} {there} {ON_EXPERTS} --load {tmp_path} --ckpt-step 1")
    require_same_curve(ours, grid)
    # Stock has an optimizer of their own for experts only where EP says so. The first loss depends on weights alone.
    fresh = f"{MIXTURE} --load {tmp_path} --ckpt-step 1 --no-load-optim"
    megatrons = losses(tree, 1, fresh, launcher=False)
    assert abs(megatrons[2] - grid[2]) > 1e-3, (megatrons, grid)


@pytest.mark.parametrize("tag", TREES)
def test_a_checkpoint_of_the_grid_goes_on_in_stock(tag: str, tmp_path: Path) -> None:
    tree = tree_of(tag)
    grid = losses(tree, 4, f"--head-dim-parallel 2,2 --save {tmp_path} --save-interval 2")
    stock = losses(tree, 1, f"--load {tmp_path} --ckpt-step 2", launcher=False)
    for iteration in (5, 6, 7):
        assert stock[iteration] == pytest.approx(grid[iteration], abs=1e-4)


@pytest.mark.skipif(WHOLE == "core_v0.16.1", reason="the newer release needs Python 3.12")
def test_checkpoints_between_0_16_and_0_19(tmp_path: Path) -> None:
    earlier, newer, grid = tree_of("core_v0.16.1"), tree_of(WHOLE), "--head-dim-parallel 2,2"
    losses(earlier, 1, f"--save {tmp_path}/earlier --save-interval 1 --exit-interval 1", launcher=False)
    stock = losses(newer, 1, f"--load {tmp_path}/earlier", launcher=False)
    ours = losses(newer, 4, f"{grid} --load {tmp_path}/earlier --save {tmp_path}/newer --save-interval 7")
    assert ours == pytest.approx(stock, abs=1e-4) and sorted(ours) == [2, 3, 4, 5, 6, 7]
    status, output = run(earlier, 4, f"{grid} --load {tmp_path}/newer --train-iters 8")
    assert status != 0 and "as Megatron-Core 0.19 and newer write it" in output, output[-3000:]


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


@pytest.mark.parametrize("saving", ["", "--async-save --async-strategy mcore", "--ckpt-format torch"])
def test_changed_bytes_and_code_in_what_the_grid_saved(tree: Path, tmp_path: Path, saving: str) -> None:
    if WHOLE == "core_v0.16.1":
        saving = saving.replace(" --async-strategy mcore", "")
    grid = f"--head-dim-parallel 1,2 {saving} --global-batch-size 2"
    first = losses(tree, 2, f"{grid} --save {tmp_path} --save-interval 1 --exit-interval 1")
    load = f"{grid} --load {tmp_path} --train-iters 2 --override-opt-param-scheduler"
    assert sorted(first) == [1] and sorted(losses(tree, 2, load)) == [2]
    folder = tmp_path / "iter_0000001"
    assert (folder / "integrity.json").exists() == (saving != "--ckpt-format torch")
    shard = max(folder.rglob("*.distcp" if saving != "--ckpt-format torch" else "*.pt"), key=lambda f: f.stat().st_size)
    whole = shard.read_bytes()
    shard.write_bytes(whole[:20000] + bytes(byte ^ 1 for byte in whole[20000:20004]) + whole[20004:])
    status, output = run(tree, 2, load)
    assert status != 0 and f"{shard} has changed since it was written" in output, output[-3000:]
    shard.write_bytes(whole)
    if saving == "--ckpt-format torch":
        torch.save(torch.load(shard, weights_only=False) | {"payload": Hostile(tmp_path / "made")}, shard)
        status, output = run(tree, 2, load)
        assert status != 0 and not (tmp_path / "made").exists()
        (said,) = [line for line in output.splitlines() if "pretrain_gpt.py: error:" in line]
        assert f"{shard} names os.makedirs" in said and "--trust-checkpoint" in said
        assert sorted(losses(tree, 2, f"{load} --trust-checkpoint")) == [2] and (tmp_path / "made").exists()
    if not saving:
        (folder / "integrity.json").unlink()
        status, output = run(tree, 2, load)
        assert status == 0 and output.count(f"checkpoint {folder} has no checksums") == 1


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


@pytest.mark.skipif(WHOLE == "core_v0.16.1", reason="flags of newer releases")
def test_what_newer_releases_have_beside_is_refused_in_one_line(tree: Path) -> None:
    asked = (
        *(
            "--optimizer soap",
            "--dataloader-inter-document-masking",
            "--hybrid-context-parallel",
            "--use-megatron-fsdp",
        ),
        *("--tensor-parallel-num-weight-shards 8", "--hybrid-layer-pattern *-*-", "--cuda-graph-impl local"),
        *("--ckpt-format torch_dcp", "--non-persistent-ckpt-type local", "--perform-rl-step", "--use-torch-fsdp2"),
    )
    status, output = run(tree, 1, f"--head-dim-parallel 2,2 {' '.join(asked)}")
    (said,) = [line for line in output.splitlines() if "pretrain_gpt.py: error:" in line]
    assert status != 0 and all(flag in said for flag in asked)


def test_without_the_flag_nothing_changes(tree: Path) -> None:
    layout = "--tensor-model-parallel-size 2"
    assert losses(tree, 2, layout) == losses(tree, 2, layout, launcher=False)


@pytest.mark.parametrize("tag", TREES)
def test_a_patched_tree_needs_no_launcher(tmp_path: Path, tag: str) -> None:
    patched = release_tree(tag, tmp_path / "tree")
    untouched = losses(patched, 1, f"--save {tmp_path}/checkpoints --save-interval 1", launcher=False)
    assert cli.main(["patch", str(patched)]) == 0
    assert losses(patched, 1, "", launcher=False) == untouched
    grid = losses(patched, 4, f"--head-dim-parallel 2,2 --load {tmp_path}/checkpoints --ckpt-step 1", launcher=False)
    require_same_curve(untouched, grid)
