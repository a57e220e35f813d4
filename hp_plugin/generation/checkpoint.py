"""A checkpoint of the reference trainer as a model that generates, on whatever layout."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import fields, replace
from math import gcd
from pathlib import Path

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from hp_plugin.checkpoint.checks import check_files, check_tensors
from hp_plugin.config import HeadDimConfig
from hp_plugin.training.checkpoints.folder import CheckpointFolder
from hp_plugin.training.config import TrainingConfig
from hp_plugin.training.model import build_gpt

_OF_THE_RUN = (
    *("global_batch_size", "lr_decay_iters", "lr_warmup_fraction", "recompute_granularity", "recompute_method"),
    *("recompute_num_layers", "recompute_modules", "num_layers_per_virtual_pipeline_stage", "distributed_backend"),
    *("tensorboard_dir", "loss_file", "eval_interval", "save", "load", "save_interval", "exit_interval"),
    "exit_signal_handler",
    # Nothing is dropped: a token's text must not depend on what else is in its batch.
    "moe_expert_capacity_factor",
)
"""Options of the training run that generation has none of."""


def recorded(load: str | Path) -> tuple[Path, TrainingConfig]:
    """The latest checkpoint under a directory, and the options of the run that saved it.

    Raises:
        ValueError: there is none, it is incomplete, or another program's or format's.
    """
    folder = CheckpointFolder(Path(load)).latest()
    if folder is None:
        raise ValueError(f"--load {load}: there is no checkpoint of the reference trainer (its --save) in it")
    if not (folder / "metadata.json").is_file():
        raise ValueError(
            f"{folder} is of --ckpt-format torch, which only the layout that saved it can train on: load it there and "
            "save it with --ckpt-format torch_dist"
        )
    check_files(folder)
    saved: Namespace = dist_checkpointing.load_common_state_dict(str(folder)).get("args", Namespace())
    names = [known.name for known in fields(TrainingConfig)]
    # Megatron-LM keeps nearly the same options; this name is the trainer's alone.
    if not hasattr(saved, "disable_bias_linear"):
        raise ValueError(
            f"{folder} was not saved by the reference trainer: from Megatron-LM's own, generate with its "
            "examples/inference/gpt/gpt_static_inference.py (docs/generation.md)"
        )
    # What an older trainer did not know has its default, as have the exchange and the order of a run without a grid.
    return folder, TrainingConfig(**{name: vars(saved)[name] for name in names if vars(saved).get(name) is not None})


def on_layout(saved: TrainingConfig, folder: Path, sequences: int, **layout: object) -> TrainingConfig:
    """The same model to generate with on another layout, given as the trainer's options of these names.

    Raises:
        ValueError: the layout contradicts itself, or computes another function than the checkpoint's.
    """
    defaults = {known.name: known.default for known in fields(TrainingConfig) if known.name in _OF_THE_RUN}
    config = replace(
        saved,
        **defaults,
        **layout,
        pipeline_model_parallel_size=1,
        context_parallel_size=1,
        sequence_parallel=False,
        use_distributed_optimizer=False,
        recompute_activations=False,
        micro_batch_size=sequences,
        attention_dropout=0.0,
        hidden_dropout=0.0,
    )
    _check_same_function(folder, saved.head_dim, config.head_dim)
    if config.num_experts is None:
        return config
    # As far apart as they go, each whole: a token's experts are few, and slices of them would all have to answer.
    spread = gcd(config.num_experts, config.tensor_parallel)
    return replace(config, expert_model_parallel_size=spread, expert_tensor_parallel_size=1)


def _check_same_function(folder: Path, saved: HeadDimConfig | None, own: HeadDimConfig | None) -> None:
    theirs, ours = (1 if grid is None or grid.exact else grid.n for grid in (saved, own))
    if theirs == ours:
        return
    said = "no grid" if own is None else " ".join(own.flags)
    if saved is None or saved.exact:
        raise ValueError(
            f"{said} computes another function than checkpoint {folder} was trained for: give another "
            "--head-dim-exchange"
        )
    raise ValueError(
        f"checkpoint {folder} was trained with {' '.join(saved.flags)}, whose {saved.n} slices of each head attend by "
        f"themselves, and {said} would compute another function: give --head-dim-exchange {saved.exchange} with a grid "
        f"of n = {saved.n}"
    )


def loaded_model(
    config: TrainingConfig, transformer_config: TransformerConfig, folder: Path, device: torch.device
) -> nn.Module:
    """This rank's part of the model, with the checkpoint's weights, in evaluation mode; a collective call.

    Raises:
        WrongModelError: on all ranks, if the checkpoint has other tensors.
    """
    model = build_gpt(config, transformer_config).to(device)
    # As Megatron's sharded_state_dict methods are told where it saves.
    metadata = {
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    state = {"model": model.sharded_state_dict(metadata=metadata)}
    check_tensors(state, folder)
    model.load_state_dict(dist_checkpointing.load(state, str(folder))["model"])
    half = config.fp16 or config.bf16
    return (Float16Module(transformer_config, model) if half else model).eval()
