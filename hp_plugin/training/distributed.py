"""From a configuration to running ranks: device, default process group, agreement, Megatron's parallel state."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from hp_plugin import cpu_backend
from hp_plugin.attention.registration import initialize_head_dim_parallel
from hp_plugin.processes import refusals
from hp_plugin.shared_gpus.placing import GLOO, NCCL, use_gpu
from hp_plugin.training.agreement import require_agreement
from hp_plugin.training.config import TrainingConfig
from hp_plugin.training.moe import expert_sizes


def find_world_size() -> int:
    """Ranks of this run: those of the default group if there is one, else those torchrun announces, else 1.

    Raises:
        ValueError: what is announced is no number of ranks.
    """
    return dist.get_world_size() if dist.is_initialized() else refusals.world_size()


@contextmanager
def running_ranks(config: TrainingConfig) -> Iterator[torch.device]:
    """Joins the default group (torchrun's, one already there, or a world of 1) and sets up Megatron's parallel state.

    Yields the device to train on: this rank's GPU, or the CPU with `hp_plugin.cpu_backend`.
    What it made is taken down at the end of the block.

    Raises:
        DisagreementError: the ranks do not have the same configuration.
    """
    device = _find_device(config)
    joined = not dist.is_initialized()
    if joined:
        _join_default_group(config, device)
    require_agreement(config, device)
    _initialize_parallel_state(config)
    _seed_generators(config.seed)
    yield device
    # Only after success: a failing rank must not wait here for the others.
    parallel_state.destroy_model_parallel()
    if joined:
        dist.destroy_process_group()


def prepare_device() -> None:
    """Makes Megatron-Core run on the CPU where there is no CUDA; must come before any other use of it.

    Where there is, it is spared the names of Transformer Engine if that is not installed.
    """
    if cpu_backend.is_enabled():
        return
    if torch.cuda.is_available():
        cpu_backend.mend_missing_packages()
    else:
        cpu_backend.enable()


def _find_device(config: TrainingConfig) -> torch.device:
    prepare_device()
    if cpu_backend.is_enabled():
        return torch.device("cpu")
    return use_gpu(backend_of(config, torch.device("cuda")))


def backend_of(config: TrainingConfig, device: torch.device) -> str:
    """The backend of process groups: as given, else NCCL on GPUs and gloo on the CPU."""
    return config.distributed_backend or (NCCL if device.type == "cuda" else GLOO)


def _join_default_group(config: TrainingConfig, device: torch.device) -> None:
    backend = backend_of(config, device)
    timeout = timedelta(minutes=config.distributed_timeout_minutes)
    arguments: dict[str, Any] = {"timeout": timeout}
    if device.type == "cuda" and backend == NCCL:
        arguments["device_id"] = device
    if "RANK" not in os.environ:  # started by hand: a world of one, which needs no address
        arguments |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    else:
        store = refusals.connect(timeout)
        refusals.wait_for_others(store, timeout)
        arguments |= {"store": store, "rank": int(os.environ["RANK"]), "world_size": refusals.world_size()}
    dist.init_process_group(backend, **arguments)


def _initialize_parallel_state(config: TrainingConfig) -> None:
    sizes: dict[str, Any] = {
        "pipeline_model_parallel_size": config.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": config.virtual_pipeline,
        "context_parallel_size": config.context_parallel_size,
        "distributed_timeout_minutes": config.distributed_timeout_minutes,
        **expert_sizes(config),
    }
    if config.head_dim is None:
        parallel_state.initialize_model_parallel(config.tensor_parallel, **sizes)
        return
    initialize_head_dim_parallel(config.head_dim, **sizes)


def _seed_generators(seed: int) -> None:
    """Seeds as Megatron does: pipeline stages differ, TP ranks have a stream each, data-parallel ranks share theirs."""
    stage_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(stage_seed)
    np.random.seed(stage_seed)
    torch.manual_seed(stage_seed)
    tensor_parallel.model_parallel_cuda_manual_seed(stage_seed)
