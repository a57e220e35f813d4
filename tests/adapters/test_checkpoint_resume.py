"""The trainer's checkpoint flags: an interrupted run goes on as if it never stopped, and what cannot load says so."""

from __future__ import annotations

import io
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async

from hp_plugin.checkpoint.checks import WrongModelError
from tests.adapters.checkpoint_cases import quick_results_queue
from tests.dist.training_runs import train
from tests.ranks import Ranks

# Dropout is on: without the random states of the checkpoint no loss after it would be the same.
RUN = "--mock-data --train-iters 6 --attention-dropout 0.1 --hidden-dropout 0.1"
INTERRUPTED = f"{RUN} --save-interval 2 --exit-interval 3"

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*load_state_dict. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*we are deprecating ShardedTensor:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*local is another function:UserWarning"),
]


@contextmanager
def writing_files() -> Iterator[None]:
    # Megatron-Core writes files from processes of its own, which multiprocessing denies to the harness' daemons.
    multiprocessing.current_process()._config["daemon"] = False
    filesystem_async._results_queue = quick_results_queue()
    try:
        yield
    finally:
        filesystem_async._results_queue = None


def train_saving(cache: str, flags: str) -> tuple[dict[int, float], str]:
    with writing_files():
        return train(cache, flags)


def all_runs(cache: str, layout: str, folder: str, interrupted: str, resumed: str) -> list[dict[int, float]]:
    saving = f"{layout} --save {folder} --load {folder}"
    whole, _ = train_saving(cache, f"{layout} {RUN}")
    first, _ = train_saving(cache, f"{saving} {INTERRUPTED} {interrupted}")
    second, _ = train_saving(cache, f"{saving} {RUN} {resumed}")
    return [whole, first, second]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "interrupted", "resumed"),
    [
        ("--head-dim-parallel 2,2", "", "--async-save"),
        ("--head-dim-parallel 2,2 --head-dim-exchange scores", "--async-save", ""),
        ("--head-dim-parallel 1,2 --use-distributed-optimizer --bf16", "", ""),
        ("--pipeline-model-parallel-size 2 --tensor-model-parallel-size 2", "--async-save", "--async-save"),
        ("--head-dim-parallel 2,2 --fp16 --initial-loss-scale 1024", "--ckpt-format torch", "--ckpt-format torch"),
    ],
)
def test_an_interrupted_run_prints_the_same_losses(
    ranks: Ranks, tmp_path: Path, layout: str, interrupted: str, resumed: str
) -> None:
    folder = str(tmp_path / "run")
    whole, first, second = ranks.run(4, all_runs, str(tmp_path), layout, folder, interrupted, resumed, timeout=600)[-1]
    assert sorted(first) == [1, 2, 3] and sorted(second) == [4, 5, 6]
    assert first | second == whole
    assert (tmp_path / "run" / "latest_checkpointed_iteration.txt").read_text() == "6"
    assert not list((tmp_path / "run").glob("*.partial*"))


def refused(cache: str, flags: str) -> str:
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            train_saving(cache, flags)
    except SystemExit:  # what a value alone tells is refused with the command line
        return said.getvalue()
    except WrongModelError as mistake:
        parallel_state.destroy_model_parallel()  # a run that fails leaves it standing
        return f"on the ranks: {mistake}"
    except ValueError as mistake:
        return str(mistake)
    return "loaded"


def damaged(cache: str, path: str) -> dict[str, Any]:
    """One run's checkpoints, and what is said of loading them otherwise; world of one rank."""
    said: dict[str, Any] = {}
    local = f"--mock-data --head-dim-parallel 1,1 --train-iters 1 --save {path}/good"
    train_saving(cache, local)
    load = f"--mock-data --train-iters 2 --load {path}/good"
    said["model"] = refused(cache, f"{load} --num-layers 3")
    said["shape"] = refused(cache, f"{load} --ffn-hidden-size 48")
    said["format"] = refused(cache, f"{load} --ckpt-format torch")
    said["optimizer"] = refused(cache, f"{load} --use-distributed-optimizer")
    said["biases"] = refused(cache, f"{load} --disable-bias-linear")
    said["finetuned"] = refused(cache, f"{load} --disable-bias-linear --finetune --train-iters 1")
    said["norms"] = refused(cache, f"{load} --normalization RMSNorm")
    said["output"] = refused(cache, f"{load} --untie-embeddings-and-output-weights")
    train_saving(cache, f"{local.replace('/good', '/untied')} --untie-embeddings-and-output-weights")
    said["tied"] = refused(cache, load.replace("/good", "/untied"))
    said["weights alone"] = refused(cache, f"{load} --use-distributed-optimizer --finetune --train-iters 1")
    folder = Path(path) / "good" / "iter_0000001"
    shard = max(folder.glob("*.distcp"), key=lambda file: file.stat().st_size)
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    said["truncated"], said["shard"] = refused(cache, load), str(shard)
    shard.unlink()
    said["missing"] = refused(cache, load)
    return said


def test_what_cannot_load_says_why(ranks: Ranks, tmp_path: Path) -> None:
    said = ranks.run(1, damaged, str(tmp_path), str(tmp_path))[0]
    assert "--num-layers 2, this run has 3" in said["model"]
    assert "on the ranks: checkpoint" in said["shape"]
    assert "mlp.linear_fc1.weight is (2, 128, 32) there and (2, 48, 32) here" in said["shape"]
    assert "not of --ckpt-format torch" in said["format"]
    assert "without --use-distributed-optimizer" in said["optimizer"]
    assert "layers.mlp.linear_fc1.bias (2, 128) is left over (it comes from no --disable-bias-linear" in said["biases"]
    assert said["finetuned"] == said["biases"]
    assert "left over (it comes from no --disable-bias-linear, or --normalization LayerNorm)" in said["norms"]
    assert "output_layer.weight (384, 32) is not in the checkpoint" in said["output"]
    assert "output_layer.weight (384, 32) is left over" in said["tied"]
    assert "(it comes from --untie-embeddings-and-output-weights)" in said["tied"]
    assert said["weights alone"] == "loaded"
    assert f"{said['shard']} is truncated" in said["truncated"]
    assert f"{said['shard']} is missing" in said["missing"]


def own_files(cache: str, path: str) -> dict[str, str]:
    """What is said, on this rank, of files of --ckpt-format torch that do not fit."""
    layout = "--mock-data --head-dim-parallel 1,2 --ckpt-format torch"
    train_saving(cache, f"{layout} --train-iters 1 --save {path}/own")
    load, said = f"{layout} --train-iters 2 --load {path}/own", {}
    said["its own"] = refused(cache, load)
    said["biases"] = refused(cache, f"{load} --disable-bias-linear")
    said["QK-norm"] = refused(cache, f"{load} --qk-layernorm")
    said["shape"] = refused(cache, f"{load} --ffn-hidden-size 64 --finetune")
    said["stock"] = refused(cache, load.replace("--head-dim-parallel 1,2", "--tensor-model-parallel-size 2"))
    file = Path(path) / "own" / "iter_0000001" / "mp_rank_01" / "model_optim_rng.pt"
    if dist.get_rank() == 0:
        file.write_bytes(file.read_bytes()[:1000])
    dist.barrier()
    said["damaged"] = refused(cache, load)
    dist.barrier()
    if dist.get_rank() == 0:
        file.unlink()
    dist.barrier()
    said["missing"] = refused(cache, load)
    return said


def test_a_ranks_own_file_that_does_not_fit_is_told_alike_on_all_ranks(ranks: Ranks, tmp_path: Path) -> None:
    both = ranks.run(2, own_files, str(tmp_path), str(tmp_path))
    assert both[0] == both[1]
    said = both[0]
    assert said["its own"] == "loaded"
    # By hand: a QKV bias of (4 + 2 · 4) · 8 channels, half of them on a rank, as 12 slots of 4.
    assert "decoder.layers.0.self_attention.linear_qkv.bias (12, 4) is left over" in said["biases"]
    assert "decoder.layers.0.self_attention.q_layernorm.weight (8,) is not in the file" in said["QK-norm"]
    assert ": decoder.layers.0.mlp.linear_fc1.weight is (64, 32) there and (32, 32) here; " in said["shape"]
    assert "loads only on the layout that saved it" in said["stock"]
    for name in ("biases", "QK-norm", "shape"):
        assert said[name].startswith("on the ranks: checkpoint") and len(said[name]) < 600
    assert "mp_rank_01/model_optim_rng.pt cannot be read" in said["damaged"]
    assert "mp_rank_01/model_optim_rng.pt is missing" in said["missing"]


def local_elsewhere(cache: str, path: str) -> list[str]:
    common = f"--mock-data --load {path} --train-iters"
    train_saving(cache, f"{common} 1 --save {path} --head-dim-parallel 2,2 --head-dim-exchange local")
    return [
        refused(cache, f"{common} 2 {other}")
        for other in (
            "--tensor-model-parallel-size 4",
            "--head-dim-parallel 2,2",
            "--head-dim-parallel 1,4 --head-dim-exchange local",
            "--head-dim-parallel 1,2 --head-dim-exchange local",
            "--head-dim-parallel 2,2 --head-dim-allow-other-function",
        )
    ]


@pytest.mark.slow
def test_a_local_checkpoint_is_refused_by_other_functions(ranks: Ranks, tmp_path: Path) -> None:
    *refusals, narrower, overridden = ranks.run(4, local_elsewhere, str(tmp_path), str(tmp_path / "run"))[0]
    assert all("another function" in refusal for refusal in refusals)
    assert [narrower, overridden] == ["loaded", "loaded"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--save-interval 2", "--save-interval 2 needs --save"),
        ("--async-save", "--async-save needs --save"),
        ("--save x --async-save --ckpt-format torch", "--async-save needs --ckpt-format torch_dist"),
        ("--ckpt-format torch --use-distributed-optimizer", "needs --ckpt-format torch_dist"),
        ("--finetune", "--finetune needs --load"),
        ("--save x --save-interval 0", "--save-interval must be positive"),
    ],
)
def test_flags_that_contradict_are_refused(ranks: Ranks, tmp_path: Path, flags: str, words: str) -> None:
    assert words in ranks.run(1, refused, str(tmp_path), f"--mock-data {flags}")[0]
