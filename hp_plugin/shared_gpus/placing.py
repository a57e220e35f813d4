"""Which GPU a rank has, where there may be more ranks than GPUs."""

from __future__ import annotations

import os

import torch

from hp_plugin.shared_gpus.staging import Staging

GLOO, NCCL = "gloo", "nccl"

_STAGING = Staging()


def device_index(local_rank: int, local_ranks: int, devices: int, backend: str) -> int:
    """The GPU of one of the `local_ranks` ranks of this machine: in turn.

    Raises:
        ValueError: NCCL would have to put two ranks of a group on one GPU.
    """
    if backend == NCCL and local_ranks > devices:
        raise ValueError(
            f"{local_ranks} ranks on {devices} GPU{'s' if devices > 1 else ''}: NCCL takes a GPU for one rank; "
            f"--distributed-backend {GLOO} puts several on one, to try things out, or start {devices}"
        )
    return local_rank % devices


def use_gpu(backend: str) -> torch.device:
    """Makes this rank's GPU the current one and, over gloo, stages its collectives and says so.

    Raises:
        ValueError: as `device_index`.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    devices = torch.cuda.device_count()
    device = torch.device("cuda", device_index(local_rank, local_ranks, devices, backend))
    torch.cuda.set_device(device)
    if backend == GLOO:
        _STAGING.install()
        if os.environ.get("RANK", "0") == "0":
            print(described(local_ranks, devices, torch.cuda.get_device_name(device)), flush=True)
    return device


def described(local_ranks: int, devices: int, name: str) -> str:
    """The line that is said once."""
    ranks = f"{local_ranks} rank{'s' if local_ranks > 1 else ''}"
    return (
        f"hp_plugin: {ranks} in turn on {devices} × {name} over gloo, by way of host memory: "
        "what it computes is right, how long it takes says nothing"
    )
