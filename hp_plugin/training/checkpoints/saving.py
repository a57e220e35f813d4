"""Saving and resuming the reference trainer, with the meaning that Megatron-LM gives its flags."""

from __future__ import annotations

import atexit
import functools
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

from hp_plugin.checkpoint.checks import check_files, check_tensors, read_common_state, refuse_together
from hp_plugin.checkpoint.checksums import complete_checksums, write_shard_checksums, write_with_checksums
from hp_plugin.checkpoint.contents import check_contents
from hp_plugin.checkpoint.expert_optimizer import check_expert_optimizer
from hp_plugin.checkpoint.names import RELEASE
from hp_plugin.checkpoint.reading import trusting
from hp_plugin.checkpoint.rules import check_same_function, recorded_head_dim
from hp_plugin.training.checkpoints import legacy as legacy_checkpoint
from hp_plugin.training.checkpoints.failures import loading, saving
from hp_plugin.training.checkpoints.folder import CheckpointFolder
from hp_plugin.training.checkpoints.lock import FolderInUseError, FolderLock
from hp_plugin.training.checkpoints.state import content_metadata, restore, sharded_state
from hp_plugin.training.config import TrainingConfig
from hp_plugin.training.log import print_rank_0
from hp_plugin.training.step import Trainer
from hp_plugin.upstream.checkpoint_format import own_queue
from hp_plugin.upstream.write_results import write_without_server

_SAME_MODEL = ("num_layers", "hidden_size", "num_attention_heads", "kv_channels", "num_query_groups")
_LAYOUT = (
    *("world_size", "tensor_model_parallel_size", "pipeline_model_parallel_size"),
    *("virtual_pipeline_model_parallel_size", "context_parallel_size"),
)


def check_load(config: TrainingConfig) -> None:
    """Reads what the checkpoint to load says of itself; needs no process group.

    Raises:
        ValueError: it is incomplete, of another model or another attention, or in a format that this run cannot load.
    """
    folder = None if config.load is None else CheckpointFolder(Path(config.load)).latest()
    if folder is None:
        return
    if (folder / "metadata.json").is_file() != (config.ckpt_format == "torch_dist"):
        raise ValueError(f"{folder} is not of --ckpt-format {config.ckpt_format}: give the other one, or load another")
    if config.ckpt_format == "torch":
        saved = legacy_checkpoint.read_arguments(folder, config.trust_checkpoint)
        legacy_checkpoint.check_layout(config, saved)
    else:
        check_files(folder, config.trust_checkpoint)
        common = read_common_state(folder, config.trust_checkpoint)
        saved = common.get("args", Namespace())
        if not config.finetune:
            _check_optimizer(config, folder, saved, common)
    own = {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "kv_channels": config.kv_channels or config.hidden_size // config.num_attention_heads,
        "num_query_groups": config.query_groups,
    }
    for name in _SAME_MODEL:
        theirs = getattr(saved, name, None)
        if theirs is not None and theirs != own[name]:
            raise ValueError(
                f"checkpoint {folder} is of a model with --{name.replace('_', '-')} {theirs}, this run has {own[name]}"
            )
    check_same_function(recorded_head_dim(saved), config.head_dim, config.head_dim_allow_other_function)


def _check_optimizer(config: TrainingConfig, folder: Path, saved: Namespace, common: dict[str, Any]) -> None:
    way_out = "or give --finetune to start from its weights alone"
    theirs = getattr(saved, "use_distributed_optimizer", config.use_distributed_optimizer)
    if theirs != config.use_distributed_optimizer:
        with_or_without = "with" if theirs else "without"
        raise ValueError(
            f"checkpoint {folder} was saved {with_or_without} --use-distributed-optimizer: run {with_or_without} it "
            + way_out
        )
    content = common.get("content_metadata") or {}
    kind = content.get("distrib_optim_sharding_type", "fully_reshardable")
    if theirs and kind != "fully_reshardable":
        raise ValueError(
            f"checkpoint {folder} keeps the distributed optimizer's state as {kind}, which loads only into the very "
            f"run that saved it: save it there with --dist-ckpt-optim-fully-reshardable, {way_out}"
        )


class Checkpoints:
    """Loads and saves one trainer, after `check_load`; every method is a collective call."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.config = trainer.config
        self.saved = -1
        self._queue = AsyncCallsQueue()
        write_without_server()
        self._lock = None if self.config.save is None else _locked(Path(self.config.save))

    def load(self) -> int:
        """Restores the latest checkpoint of --load; returns its iteration, 0 if there is none or to --finetune.

        Raises:
            ValueError: it is of another model; names the first tensors that differ.
        """
        folder = None if self.config.load is None else CheckpointFolder(Path(self.config.load)).latest()
        if folder is None:
            if self.config.load is not None:
                print_rank_0(f" > no checkpoint in {self.config.load} yet: starting from the initial weights")
            return 0
        if self.config.ckpt_format == "torch":
            iteration = legacy_checkpoint.load(self.trainer, folder)
        else:
            iteration = self._load_sharded(folder)
        iteration = 0 if self.config.finetune or folder.name == RELEASE else iteration
        dist.barrier()
        print_rank_0(f" > loaded {folder}; going on after iteration {iteration}")
        self.saved = iteration
        return iteration

    def after(self, iteration: int) -> bool:
        """Saves if --save-interval says so; True if --exit-interval says that the run ends here."""
        self._finalize(blocking=False)
        if self._lock is not None:
            self._lock.sign()
        if self.config.save_interval is not None and iteration % self.config.save_interval == 0:
            self.save(iteration)
        return self.config.exit_interval is not None and iteration % self.config.exit_interval == 0

    def finish(self, iteration: int, ended_by: str = "") -> None:
        """Saves the last iteration unless it is saved, and waits until everything is on disk.

        Args:
            ended_by: the signal that the run ends on, which is said together with what is saved.
        """
        ending = f", and ending on {ended_by}" if ended_by else ""
        if self.config.save is not None and iteration > 0 and self.saved != iteration:
            self.save(iteration, ending)
        elif ending:
            print_rank_0(f" > iteration {iteration} is saved in {self.config.save}{ending}")
        self._finalize(blocking=True)
        self._queue.close()
        if self._lock is not None:
            self._lock.release()
            atexit.unregister(self._lock.release)

    def what_is_saved(self) -> str:
        """What is left of this run if it ends now, in words."""
        if self.config.save is None:
            return "not saved, for want of --save"
        latest = CheckpointFolder(Path(self.config.save)).latest()
        if latest is None:
            return f"not saved, and there is no checkpoint in {self.config.save} yet"
        return f"not saved; the latest checkpoint is {latest}"

    def save(self, iteration: int, ending: str = "") -> None:
        """Writes a checkpoint and says so with `ending`; with --async-save, begins to, after the last is complete."""
        assert self.config.save is not None
        # Two at a time could become complete in the wrong order.
        self._finalize(blocking=True)
        folders = CheckpointFolder(Path(self.config.save))
        with saving(folders.path):
            names = [str(folders.begin(iteration)) if dist.get_rank() == 0 else ""]
        dist.broadcast_object_list(names, src=0)
        partial = Path(names[0])

        def complete() -> None:
            if dist.get_rank() == 0:
                if self.config.ckpt_format == "torch_dist":
                    complete_checksums(partial, dist.get_world_size())
                folders.complete(partial, iteration)
            print_rank_0(f" > saved checkpoint of iteration {iteration} to {self.config.save}{ending}")

        self.saved = iteration
        with saving(folders.path):
            if self.config.ckpt_format == "torch":
                legacy_checkpoint.save(self.trainer, iteration, partial)
            elif self._begin_sharded(partial, iteration, complete):
                return
            dist.barrier()
            complete()
        dist.barrier()

    def _begin_sharded(self, partial: Path, iteration: int, complete: Callable[[], None]) -> bool:
        """Writes this rank's shards with their checksums; with --async-save, begins to and returns True."""
        metadata = content_metadata(self.trainer)
        request = dist_checkpointing.save(
            sharded_state(self.trainer, iteration, metadata),
            str(partial),
            async_sharded_save=self.config.async_save,
            content_metadata={name: value for name, value in metadata.items() if name != "dp_cp_group"},
            **own_queue(),
        )
        if request is None:
            write_shard_checksums(partial, dist.get_rank())
            return False
        if request.async_fn is not None:
            write = functools.partial(write_with_checksums, request.async_fn, partial, dist.get_rank())
            request = request._replace(async_fn=write)
        request.add_finalize_fn(complete)
        self._queue.schedule_async_request(request)
        return True

    def _finalize(self, blocking: bool) -> None:
        if self.config.save is None:
            return
        with saving(Path(self.config.save)):
            self._queue.maybe_finalize_async_calls(blocking=blocking)

    def _load_sharded(self, folder: Path) -> int:
        trusted = self.config.trust_checkpoint
        unknown = check_contents(folder, trusted)
        if unknown is not None:
            print_rank_0(f" > {unknown}")
        common = read_common_state(folder, trusted)
        saved: Namespace = common.get("args", Namespace())
        whole = not self.config.finetune
        state = sharded_state(
            self.trainer,
            0,
            content_metadata(self.trainer),
            loading=True,
            optimizer=whole,
            # Random states are a rank's own: another layout starts with new ones, as Megatron-LM does.
            random_states=whole and self._same_layout(saved) and folder.name != RELEASE,
        )
        check_tensors(state, folder, trusted)
        check_expert_optimizer(state, common, folder)
        asked = set(state)
        with loading(folder), trusting(trusted):
            loaded = dist_checkpointing.load(state, str(folder))
        # What is not sharded comes along unasked: of an optimizer, its hyperparameters without its tensors.
        restore(self.trainer, {name: value for name, value in loaded.items() if name in asked})
        return int(common.get("iteration", 0))

    def _same_layout(self, saved: Namespace) -> bool:
        config = self.config
        own = {
            "world_size": dist.get_world_size(),
            "tensor_model_parallel_size": config.tensor_parallel,
            "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
            "virtual_pipeline_model_parallel_size": config.virtual_pipeline,
            "context_parallel_size": config.context_parallel_size,
        }
        theirs = recorded_head_dim(saved)
        grids = [None if head_dim is None else head_dim.grid for head_dim in (theirs, config.head_dim)]
        return grids[0] == grids[1] and all(getattr(saved, name, None) == own[name] for name in _LAYOUT)


def _locked(folder: Path) -> FolderLock | None:
    """The first rank takes the lock of a folder, for all; a collective call over the default group."""
    lock, complaints = None, []
    if dist.get_rank() == 0:
        lock = FolderLock(folder)
        try:
            lock.take()
        except FolderInUseError as refusal:
            complaints = [str(refusal)]
        except OSError as error:
            complaints = [f"--save {folder} cannot be written to ({error.strerror}): name another"]
        else:
            atexit.register(lock.release)
    refuse_together(complaints, folder, "cannot be written")
    return lock
