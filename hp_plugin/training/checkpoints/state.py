"""What a checkpoint of the reference trainer holds, in Megatron-LM's arrangement: either can read the other's."""

from __future__ import annotations

import random
from argparse import Namespace
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch import nn

from hp_plugin.checkpoint.rules import record_head_dim
from hp_plugin.training.step import Trainer
from hp_plugin.training.transformer import params_dtype

VERSION = 3.0
"""Megatron's `checkpoint_version` for weights in today's order."""


def content_metadata(trainer: Trainer) -> dict[str, Any]:
    """What Megatron's `sharded_state_dict` methods are told; saved with the checkpoint, but for the process group."""
    metadata: dict[str, Any] = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    if trainer.config.use_distributed_optimizer:
        # The only sharding type of this optimizer that loads on another layout.
        metadata["distrib_optim_sharding_type"] = "fully_reshardable"
        metadata["distrib_optim_fully_reshardable_mem_efficient"] = False
    return metadata | {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def arguments_record(trainer: Trainer, iteration: int) -> Namespace:
    """The options of this run under Megatron-LM's names, with the grid and what depends on the layout resolved."""
    config, model = trainer.config, trainer.transformer_config
    record = Namespace(**asdict(config))
    record.tensor_model_parallel_size = config.tensor_parallel
    record.data_parallel_size = parallel_state.get_data_parallel_world_size()
    record.world_size = dist.get_world_size()
    record.virtual_pipeline_model_parallel_size = config.virtual_pipeline
    record.kv_channels, record.num_query_groups = model.kv_channels, model.num_query_groups
    record.ffn_hidden_size = model.ffn_hidden_size
    record.padded_vocab_size = config.padded_vocab_size
    record.add_position_embedding = config.position_embedding_type == "learned_absolute"
    record.params_dtype = params_dtype(config)
    record.consumed_train_samples = iteration * trainer.batch_size
    record.global_batch_size = trainer.batch_size
    record_head_dim(record, config.head_dim)
    return record


def unwrapped(chunk: nn.Module) -> nn.Module:
    """The GPTModel inside Megatron's wrappers."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def model_keys(trainer: Trainer) -> list[str]:
    """Names of the model chunks in the checkpoint's dictionary."""
    chunks = len(trainer.model)
    return ["model"] if chunks == 1 else [f"model{k}" for k in range(chunks)]


def sharded_state(
    trainer: Trainer,
    iteration: int,
    metadata: dict[str, Any],
    loading: bool = False,
    optimizer: bool = True,
    random_states: bool = True,
) -> dict[str, Any]:
    """The state dict for `dist_checkpointing`; a collective call, as the distributed optimizer gathers its state."""
    state: dict[str, Any] = {
        "args": arguments_record(trainer, iteration),
        "checkpoint_version": VERSION,
        "iteration": iteration,
    }
    for key, chunk in zip(model_keys(trainer), trainer.model, strict=True):
        state[key] = unwrapped(chunk).sharded_state_dict(metadata=metadata)
    if optimizer:
        state["optimizer"] = trainer.optimizer.sharded_state_dict(state, is_loading=loading, metadata=metadata)
        state["opt_param_scheduler"] = trainer.scheduler.state_dict()
    if random_states:
        state["rng_state"] = ShardedObject(
            "rng_state", [read_random_states()], _model_parallel_sizes(), _model_parallel_ranks(), _data_parallel_rank()
        )
    return state


def restore(trainer: Trainer, state: dict[str, Any]) -> None:
    """Puts a loaded state in place; the parts that were not asked for are not in it."""
    for key, chunk in zip(model_keys(trainer), trainer.model, strict=True):
        unwrapped(chunk).load_state_dict(state[key])
    if "optimizer" in state:
        trainer.optimizer.load_state_dict(state["optimizer"])
        trainer.scheduler.load_state_dict(state["opt_param_scheduler"])
    else:
        # Half-precision optimizers keep fp32 copies of the parameters they were built with.
        trainer.optimizer.reload_model_params()
    if "rng_state" in state:
        write_random_states(state["rng_state"][0])


def read_random_states() -> dict[str, Any]:
    """Every generator of this rank, under Megatron-LM's names."""
    return {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.cuda.get_rng_state(),
        "rng_tracker_states": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def write_random_states(states: dict[str, Any]) -> None:
    """The inverse of `read_random_states`."""
    random.setstate(states["random_rng_state"])
    np.random.set_state(states["np_rng_state"])
    torch.set_rng_state(states["torch_rng_state"])
    torch.cuda.set_rng_state(states["cuda_rng_state"])
    tensor_parallel.get_cuda_rng_tracker().set_states(states["rng_tracker_states"])


def _model_parallel_sizes() -> tuple[int, int]:
    return (
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )


def _model_parallel_ranks() -> tuple[int, int]:
    return parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_tensor_model_parallel_rank()


def _data_parallel_rank() -> int:
    return int(parallel_state.get_data_parallel_rank(with_context_parallel=True))
