"""The trainer's checkpoint flags: an interrupted run goes on as if it never stopped, and what cannot load says so."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async

from hp_plugin.checkpoint.checks import WrongModelError
from hp_plugin.training.checkpoints.lock import NAME as LOCK
from hp_plugin.training.checkpoints.lock import Owner, process_ticks
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
        # Of one sample activations move in training, and weights in the passes between.
        ("--head-dim-parallel 2,2 --micro-batch-size 1 --eval-interval 1 --eval-iters 1", "", ""),
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
    # As many bytes as before, one of them another.
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    shard.write_bytes(flipped)
    said["flipped"] = refused(cache, load)
    shard.write_bytes(bytes(len(whole)))
    (folder / "integrity.json").rename(folder / "aside")
    said["zeros, without checksums"] = refused(cache, load)
    shard.write_bytes(whole)
    (folder / "aside").rename(folder / "integrity.json")
    said["whole again"] = refused(cache, load)
    alive = replace(Owner.this_process(), pid=os.getppid(), ticks=process_ticks(os.getppid()) or 0)
    (Path(path) / "good" / LOCK).write_text(json.dumps(asdict(alive)))
    said["in use"] = refused(cache, f"{load} --save {path}/good")
    (Path(path) / "good" / LOCK).write_text(json.dumps(asdict(replace(alive, ticks=1))))
    said["not in use"] = refused(cache, f"{load.replace('--train-iters 2', '--train-iters 1')} --save {path}/good")
    said["left"] = (Path(path) / "good" / LOCK).exists()
    return said | hostile(cache, load, folder, Path(path) / "ran")


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, made: Path) -> None:
        self.made = str(made)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.makedirs, (self.made, 0o777, True)


def hostile(cache: str, load: str, folder: Path, made: Path) -> dict[str, Any]:
    """What is said of files that would run code, and whether they did: without and with trust."""
    said: dict[str, Any] = {}
    (folder / "integrity.json").unlink()
    common, index = folder / "common.pt", folder / ".metadata"
    kept = {file: file.read_bytes() for file in (common, index) if file.exists()}
    if common.exists():  # up to 0.18
        torch.save(torch.load(common) | {"payload": Hostile(made)}, common)
        said["common state"], said["ran 1"] = refused(cache, load), made.exists()
        said["trusted"] = refused(cache, f"{load} --trust-checkpoint")
        said["ran, trusted"] = made.exists()
        made.rmdir()
        common.write_bytes(kept[common])
    stored = pickle.loads(kept[index])
    stored.planner_data = Hostile(made)
    index.write_bytes(pickle.dumps(stored))
    said["index"], said["ran 2"] = refused(cache, load), made.exists()
    # An object among the shards, which torch itself unpickles: random states that are no such thing.
    stored = pickle.loads(kept[index])
    torch.save([Hostile(made)], folder / "__9_0.distcp")
    (piece,) = (piece for piece in stored.storage_data if piece.fqn.startswith("rng_state"))
    place = stored.storage_data[piece]
    length = (folder / "__9_0.distcp").stat().st_size
    stored.storage_data[piece] = replace(place, relative_path="__9_0.distcp", offset=0, length=length)
    index.write_bytes(pickle.dumps(stored))
    said["object"], said["ran 3"] = refused(cache, load), made.exists()
    index.write_bytes(kept[index])
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
    assert f"{said['shard']} has changed since it was written" in said["flipped"]
    assert "\n" not in said["zeros, without checksums"]
    assert f"{said['shard']} is garbled" in said["zeros, without checksums"]
    assert said["whole again"] == "loaded"
    assert "is written to by process" in said["in use"] and "\n" not in said["in use"]
    assert (said["not in use"], said["left"]) == ("loaded", False)
    iteration = str(Path(said["shard"]).parent)
    named = {"common state": "common.pt", "index": ".metadata", "object": "__9_0.distcp"}
    for what in named.keys() & said.keys():
        assert f"{iteration}/{named[what]} names os.makedirs" in said[what]
        assert "--trust-checkpoint" in said[what]
    assert not said.get("ran 1") and not said["ran 2"] and not said["ran 3"]
    if "trusted" in said:
        assert said["trusted"] == "loaded" and said["ran, trusted"]


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
    assert "mp_rank_01/model_optim_rng.pt has changed since it was written" in said["damaged"]
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
