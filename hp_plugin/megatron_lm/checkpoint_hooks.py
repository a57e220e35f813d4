"""The four replacements around Megatron-LM's checkpoints: refusals before a model has anything wrong, and checksums.

They can go once Megatron-LM lets plugins look at a checkpoint before it loads it, and after it has saved it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling

from hp_plugin.checkpoint.checks import check_files, check_tensors
from hp_plugin.checkpoint.contents import check_contents
from hp_plugin.checkpoint.expert_optimizer import check_expert_optimizer
from hp_plugin.checkpoint.reading import trusting
from hp_plugin.checkpoint.rules import check_same_function, check_same_layout, recorded_head_dim
from hp_plugin.config import HeadDimConfig
from hp_plugin.megatron_lm.rank_files import check_files_to_load
from hp_plugin.megatron_lm.releases import check_parameters
from hp_plugin.megatron_lm.saved_checksums import with_checksums
from hp_plugin.processes.refusals import refuse

_STRICT = {StrictHandling.ASSUME_OK_UNEXPECTED, StrictHandling.RAISE_UNEXPECTED, StrictHandling.RAISE_ALL}


class CheckpointHooks:
    """Compares what a checkpoint says and holds with the grid that `head_dim()` returns; nothing while that is None."""

    def __init__(self, checkpointing: ModuleType, head_dim: Callable[[], HeadDimConfig | None]) -> None:
        self._checkpointing = checkpointing
        self._head_dim = head_dim
        self._read: Callable[..., Any] = checkpointing._load_base_checkpoint
        self._load: Callable[..., Any] = dist_checkpointing.load
        self._save: Callable[..., Any] = dist_checkpointing.save
        self._load_common: Callable[..., Any] = dist_checkpointing.load_common_state_dict
        self._trusted = False
        self._common: tuple[str, Any] = ("", None)

    def check(self) -> None:
        """Raises RuntimeError if the functions to replace are not as known."""
        check_parameters("megatron.training.checkpointing._load_base_checkpoint", self._read, ("load_dir", "args"))
        names = ("sharded_state_dict", "checkpoint_dir", "strict")
        check_parameters("megatron.core.dist_checkpointing.load", self._load, names)
        check_parameters("megatron.core.dist_checkpointing.save", self._save, names[:2])
        name = "megatron.core.dist_checkpointing.load_common_state_dict"
        check_parameters(name, self._load_common, ("checkpoint_dir",))

    def install(self) -> None:
        """Replaces the functions for the rest of the process."""
        self._checkpointing._load_base_checkpoint = self.read
        dist_checkpointing.load = self.load
        dist_checkpointing.save = self.save
        dist_checkpointing.load_common_state_dict = self.load_common

    def read(self, load_dir: Any, args: Any, *rest: Any, **kwargs: Any) -> Any:
        """`_load_base_checkpoint`, whose result is refused where the same weights would be another function.

        Raises:
            ValueError: see `check_same_function`; for the format `torch`, also `check_same_layout`.
            SystemExit: see `check_files_to_load`; arguments (--use-checkpoint-args) are read before they are validated.
        """
        self._trusted = getattr(args, "trust_checkpoint", False)
        if getattr(args, "head_dim_parallel", None) is not None:
            try:
                check_files_to_load(args)
            except ValueError as mistake:
                refuse(str(mistake), sys.argv[0])
        with trusting(self._trusted):
            result = self._read(load_dir, args, *rest, **kwargs)
        state, kind, head_dim = result[0], result[3], self._head_dim()
        # Read for its arguments alone (--use-checkpoint-args), the checkpoint comes before the grid is known.
        if head_dim is not None and state and state.get("args") is not None:
            saved = recorded_head_dim(state["args"])
            check_same_function(saved, head_dim, getattr(args, "head_dim_allow_other_function", False))
            if getattr(kind, "name", None) == "LEGACY":
                check_same_layout("--ckpt-format torch", saved, head_dim)
        return result

    def load_common(self, checkpoint_dir: Any, *rest: Any, **kwargs: Any) -> Any:
        """`dist_checkpointing.load_common_state_dict`, which Megatron-LM calls first, of a checkpoint that is complete.

        Raises:
            ValueError: names missing and damaged files and those whose reading would run code, or says that this
                release is too old for the format.
        """
        if self._head_dim() is not None:
            check_files(checkpoint_dir, self._trusted)
        with trusting(self._trusted):
            state = self._load_common(checkpoint_dir, *rest, **kwargs)
        self._common = (str(checkpoint_dir), state)
        return state

    def load(self, *args: Any, **kwargs: Any) -> Any:
        """`dist_checkpointing.load` of a checkpoint that is complete and of this model.

        Raises:
            ValueError: names missing and damaged files, the first tensors that differ, or where the optimizer state of
                experts loads.
        """
        call = inspect.signature(self._load).bind(*args, **kwargs)
        call.apply_defaults()
        if self._head_dim() is not None:
            state, folder = call.arguments["sharded_state_dict"], str(call.arguments["checkpoint_dir"])
            check_files(folder, self._trusted)
            unknown = check_contents(folder, self._trusted)
            if unknown is not None and dist.get_rank() == 0:
                print(f"hp_plugin: {unknown}", flush=True)
            if StrictHandling(call.arguments["strict"]) in _STRICT:
                check_tensors(state, folder, self._trusted)
            before, common = self._common
            check_expert_optimizer(state, common if before == folder else self.load_common(folder), folder)
        with trusting(self._trusted):
            return self._load(*args, **kwargs)

    def save(self, *args: Any, **kwargs: Any) -> Any:
        """`dist_checkpointing.save`, on a grid with checksums, unless the release is asked for its own."""
        call = inspect.signature(self._save).bind(*args, **kwargs)
        if self._head_dim() is None or call.arguments.get("verify_integrity", False):
            return self._save(*args, **kwargs)
        return with_checksums(lambda: self._save(*args, **kwargs), str(call.arguments["checkpoint_dir"]))
