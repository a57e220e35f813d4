"""Saving and loading a checkpoint on a grid, against stock at the same TP size on the same ranks.

    torchrun --nproc-per-node 4 -m hp_plugin.bench.checkpoint --head-dim-parallel 2,2

Both models have the same global tensors, parameters and Adam state, and take turns; printed are the medians and their
ratios, and bytes and pieces of both checkpoints. A save in the background has two times: until training would go on,
and until it is on disk.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from hp_plugin.bench.grid_argument import parsed_grid
from hp_plugin.processes.rank import begin_rank
from hp_plugin.training.checkpoints.state import content_metadata, restore, sharded_state
from hp_plugin.training.config import TrainingConfig
from hp_plugin.training.distributed import prepare_device, running_ranks
from hp_plugin.training.step import Trainer, build_trainer
from hp_plugin.training.transformer import build_transformer_config
from hp_plugin.upstream.checkpoint_format import own_queue


def main() -> None:
    """Builds both trainers, then saves and loads them in turns."""
    warnings.filterwarnings("ignore")
    args = _arguments()
    prepare_device()
    config = _config(args)
    head_dim = config.head_dim
    assert head_dim is not None
    stock = replace(config, head_dim_parallel=None, tensor_model_parallel_size=head_dim.size)
    models = {"stock": build_transformer_config(stock), "grid": build_transformer_config(config)}
    with running_ranks(config) as device:
        folder = Path(_from_rank_0(tempfile.mkdtemp(prefix="checkpoints-", dir=args.dir)))
        trainers = {
            "stock": build_trainer(stock, models["stock"], device),
            "grid": build_trainer(config, models["grid"], device),
        }
        for trainer in trainers.values():
            trainer.optimizer.step()  # Adam's moments exist from the first step on
        times: dict[tuple[str, str], list[float]] = {}
        for round_ in range(args.warmup + args.rounds):
            for name, trainer in trainers.items():
                target = folder / name
                for action, seconds in _turn(trainer, target).items():
                    if round_ >= args.warmup:
                        times.setdefault((action, name), []).append(seconds)
        if dist.get_rank() == 0:
            _report(args, config, times, folder)
            shutil.rmtree(folder)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Saving and loading a checkpoint on a grid, against stock at the same TP size on the same ranks."
    )
    parser.add_argument("--head-dim-parallel", default="2,2", help="m,n with m · n = the number of ranks")
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--num-attention-heads", type=int, default=8)
    parser.add_argument("--kv-channels", type=int, default=64)
    parser.add_argument("--use-distributed-optimizer", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--dir", default=None, help="where to write (default: the system's temporary directory)")
    args = parser.parse_args()
    parsed_grid(parser, args)
    return args


def _config(args: argparse.Namespace) -> TrainingConfig:
    return TrainingConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        num_attention_heads=args.num_attention_heads,
        kv_channels=args.kv_channels,
        use_distributed_optimizer=args.use_distributed_optimizer,
        head_dim_parallel=args.head_dim_parallel,
        seq_length=128,
        micro_batch_size=2,
        train_iters=1,
        lr=1e-3,
        mock_data=True,
    )


def _turn(trainer: Trainer, target: Path) -> dict[str, float]:
    """Saves in both ways and loads what was saved last; seconds of each."""
    queue = AsyncCallsQueue()
    _clear(target)
    found = {"save": _seconds(lambda: _save(trainer, target), trainer)}
    _clear(target)
    found["async save, until training goes on"] = _seconds(lambda: _begin_save(trainer, target, queue), trainer)
    rest = _seconds(lambda: queue.maybe_finalize_async_calls(blocking=True), trainer)
    found["async save, until it is on disk"] = found["async save, until training goes on"] + rest
    found["load"] = _seconds(lambda: _load(trainer, target), trainer)
    queue.close()
    return found


def _clear(target: Path) -> None:
    if dist.get_rank() == 0:
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()


def _save(trainer: Trainer, folder: Path) -> None:
    metadata = content_metadata(trainer)
    dist_checkpointing.save(sharded_state(trainer, 1, metadata), str(folder))


def _begin_save(trainer: Trainer, folder: Path, queue: AsyncCallsQueue) -> None:
    state = sharded_state(trainer, 1, content_metadata(trainer))
    queue.schedule_async_request(dist_checkpointing.save(state, str(folder), async_sharded_save=True, **own_queue()))


def _load(trainer: Trainer, folder: Path) -> None:
    state = sharded_state(trainer, 1, content_metadata(trainer), loading=True)
    restore(trainer, dist_checkpointing.load(state, str(folder)))


def _seconds(work: Callable[[], object], trainer: Trainer) -> float:
    """The slowest rank's."""
    dist.barrier()
    start = time.perf_counter()
    work()
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = torch.tensor(time.perf_counter() - start, device=trainer.device)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return seconds.item()


def _from_rank_0(value: str) -> str:
    values = [value]
    dist.broadcast_object_list(values, src=0)
    if dist.get_rank() != 0:
        shutil.rmtree(value)
    return values[0]


def _report(
    args: argparse.Namespace, config: TrainingConfig, times: dict[tuple[str, str], list[float]], folder: Path
) -> None:
    head_dim = config.head_dim
    assert head_dim is not None
    print(
        f"{dist.get_world_size()} ranks, {args.num_layers} layers, D={args.hidden_size} h={args.num_attention_heads} "
        f"d={args.kv_channels}, {args.rounds} interleaved rounds"
    )
    for name in ("stock", "grid"):
        size = sum(file.stat().st_size for file in (folder / name).iterdir())
        print(f"  {name:5s} writes {size} bytes, {_pieces(folder / name)} pieces of tensors")
    for action in dict.fromkeys(action for action, _ in times):
        median = {name: statistics.median(times[action, name]) for name in ("stock", "grid")}
        for name in ("stock", "grid"):
            values = times[action, name]
            print(
                f"  {action} {name:5s} median {median[name] * 1e3:8.1f} ms   "
                f"(min {min(values) * 1e3:.1f}, max {max(values) * 1e3:.1f})"
            )
        print(
            f"  {action}: grid {head_dim.m}x{head_dim.n} takes "
            f"{median['grid'] / median['stock']:.2f} times as long as stock"
        )


def _pieces(folder: Path) -> int:
    stored = FileSystemReader(folder).read_metadata().state_dict_metadata.values()
    return sum(len(tensor.chunks) for tensor in stored if isinstance(tensor, TensorStorageMetadata))


if __name__ == "__main__":
    begin_rank()
    main()
