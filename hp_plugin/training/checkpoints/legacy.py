"""Megatron's old `torch` format: one file per tensor- and pipeline-parallel rank, for the same layout only."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from hp_plugin.checkpoint.checks import check_state, refuse_together
from hp_plugin.checkpoint.checksums import file_checksum, listed_checksums, verify_checksum, write_checksums
from hp_plugin.checkpoint.reading import DamagedFileError, read_torch_file
from hp_plugin.checkpoint.rules import check_same_layout, recorded_head_dim
from hp_plugin.training.checkpoints.state import (
    VERSION,
    arguments_record,
    model_keys,
    read_random_states,
    restore,
    unwrapped,
)
from hp_plugin.training.config import TrainingConfig
from hp_plugin.training.step import Trainer

FILE = "model_optim_rng.pt"


def save(trainer: Trainer, iteration: int, folder: Path) -> None:
    """Writes this rank's file; data-parallel replicas hold the same, and the first of them writes."""
    if parallel_state.get_data_parallel_rank(with_context_parallel=True) != 0:
        return
    state: dict[str, Any] = {
        "args": arguments_record(trainer, iteration),
        "checkpoint_version": VERSION,
        "iteration": iteration,
        "optimizer": trainer.optimizer.state_dict(),
        "opt_param_scheduler": trainer.scheduler.state_dict(),
        "rng_state": [read_random_states()],
    }
    for key, chunk in zip(model_keys(trainer), trainer.model, strict=True):
        state[key] = unwrapped(chunk).state_dict_for_save_checkpoint()
    path = _rank_file(trainer.config, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    write_checksums(path.parent, {path.name: file_checksum(path)})


def load(trainer: Trainer, folder: Path) -> int:
    """Restores this rank's file; returns its iteration.

    Raises:
        WrongModelError: on all ranks, if the file of any is missing, damaged or of another model.
    """
    path = _rank_file(trainer.config, folder)
    damage: list[str] = []
    try:
        state = _read(path, trainer.config.trust_checkpoint)
    except DamagedFileError as unreadable:
        damage = [str(unreadable)]
    # All ranks together: one that ended alone would leave the others waiting for it.
    refuse_together(damage, folder, "cannot be loaded")
    chunks = [unwrapped(chunk) for chunk in trainer.model]
    check_state(dict(zip(model_keys(trainer), chunks, strict=True)), state, folder)
    if trainer.config.finetune:
        for part in ("optimizer", "opt_param_scheduler", "rng_state"):
            state.pop(part, None)
    restore(trainer, state)
    return int(state["iteration"])


def read_arguments(folder: Path, trusted: bool) -> Namespace:
    """The options that the first rank's file records.

    Raises:
        ValueError: there is no such file, or it is damaged.
    """
    files = sorted(folder.glob(f"mp_rank_*/{FILE}"))
    if not files:
        raise ValueError(f"checkpoint {folder} has no mp_rank_*/{FILE}: it is incomplete, load another iteration")
    arguments = _read(files[0], trusted)["args"]
    if not isinstance(arguments, Namespace):
        raise DamagedFileError(files[0], "holds no arguments under the name args")
    return arguments


def check_layout(config: TrainingConfig, saved: Namespace) -> None:
    """Refuses a layout that this format cannot serve.

    Raises:
        ValueError: sizes or grids differ; names them.
    """
    check_same_layout("a checkpoint of --ckpt-format torch", recorded_head_dim(saved), config.head_dim)
    for name, own in (
        ("tensor_model_parallel_size", config.tensor_parallel),
        ("pipeline_model_parallel_size", config.pipeline_model_parallel_size),
        ("virtual_pipeline_model_parallel_size", config.virtual_pipeline),
    ):
        theirs = getattr(saved, name, own)
        if theirs != own:
            raise ValueError(
                f"a checkpoint of --ckpt-format torch loads only on the layout that saved it: {name} is {theirs} there "
                f"and {own} here; save with --ckpt-format torch_dist to change it"
            )


def _rank_file(config: TrainingConfig, folder: Path) -> Path:
    rank = f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}"
    if config.pipeline_model_parallel_size > 1:
        rank += f"_{parallel_state.get_pipeline_model_parallel_rank():03d}"
    return folder / rank / FILE


def _read(path: Path, trusted: bool) -> dict[str, Any]:
    expected = listed_checksums(path.parent).get(path.name)
    if expected is not None:
        verify_checksum(path, expected)
    state = read_torch_file(path, trusted)
    missing = [name for name in ("args", "iteration") if name not in state]
    if missing:
        raise DamagedFileError(path, f"holds no {missing[0]}")
    return state
