"""Weights of a DeepSpeed engine as a Megatron distributed checkpoint, which any grid and stock Megatron can load.

DeepSpeed's own checkpoints hold a rank's bytes: they resume on the same grid only.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import torch.distributed as dist
from megatron.core import dist_checkpointing
from torch import nn

from hp_plugin.checkpoint.checks import check_files, check_tensors
from hp_plugin.checkpoint.contents import check_contents

_KEY = "model"


def save_weights(engine: Any, folder: str | Path) -> None:
    """Writes the model's weights, in the dtype it trains in, as `torch_dist` shards of the stock global tensors.

    Every rank must call it. Optimizer state stays in DeepSpeed's own checkpoints.

    Raises:
        ValueError: the folder holds something already.
    """
    path = Path(folder)
    taken = [path.is_dir() and any(path.iterdir())]
    dist.broadcast_object_list(taken)  # rank 0 decides: others may look when it has begun to write
    if taken[0]:
        raise ValueError(f"{path} is not empty: save the weights to a folder of their own")
    path.mkdir(parents=True, exist_ok=True)
    sharded_by_zero = engine.zero_optimization_stage() == 3
    parameters = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(parameters) if sharded_by_zero else nullcontext():
        dist_checkpointing.save({_KEY: engine.module.sharded_state_dict()}, str(path))


def load_weights(model: nn.Module, folder: str | Path) -> None:
    """Fills a model, before `initialize` takes it, with weights saved from any grid.

    Args:
        model: a Megatron-Core model on the grid of this run.

    Raises:
        ValueError: there is no distributed checkpoint, it is damaged, would run code or is of another model, or
            DeepSpeed has the model already and keeps copies of its own.
    """
    path = Path(folder)
    if isinstance(model, deepspeed.DeepSpeedEngine) or any(hasattr(p, "ds_id") for p in model.parameters()):
        raise ValueError(
            "load_weights fills a model before hp_plugin.deepspeed_adapter.engine.initialize takes it: afterwards the "
            "optimizer would go on from the old weights"
        )
    if not dist_checkpointing.check_is_distributed_checkpoint(str(path)):
        raise ValueError(f"{path} holds no Megatron distributed checkpoint, as save_weights writes it")
    check_files(path)
    check_contents(path)
    state = {_KEY: model.sharded_state_dict()}
    check_tensors(state, path)
    loaded = dist_checkpointing.load(state, str(path))
    model.load_state_dict(loaded[_KEY])
