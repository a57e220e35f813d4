"""Random numbers that a dim group shares: its ranks hold slices of the same scores and must drop the same ones."""

from __future__ import annotations

import hashlib

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.random import _MODEL_PARALLEL_RNG_TRACKER_NAME

HEAD_PARALLEL_RNG = "head-parallel-rng"
"""Tracker state that is equal on the n ranks of a dim group and differs between the m ranks of a head group."""


def ensure_head_parallel_rng(dim_group: dist.ProcessGroup) -> None:
    """Adds the state to Megatron-Core's RNG tracker, seeded from rank 0 of the dim group; nothing if it is there.

    One broadcast of an integer over the dim axis, when the first layer that needs it is built; not in any step.

    Raises:
        RuntimeError: the tracker has not been seeded yet (`model_parallel_cuda_manual_seed`).
    """
    tracker = get_cuda_rng_tracker()
    states = tracker.get_states()
    if HEAD_PARALLEL_RNG in states:
        return
    if _MODEL_PARALLEL_RNG_TRACKER_NAME not in states:
        raise RuntimeError(
            "attention dropout with exchange `scores` needs Megatron-Core's RNG tracker: call "
            "tensor_parallel.model_parallel_cuda_manual_seed(seed) before building the model"
        )
    state = states[_MODEL_PARALLEL_RNG_TRACKER_NAME]
    state = state if isinstance(state, torch.Tensor) else state.get_state()
    digest = hashlib.sha256(state.cpu().numpy().tobytes()).digest()
    device = "cuda" if dist.get_backend(dim_group) == "nccl" else "cpu"
    seed = torch.tensor(int.from_bytes(digest[:7], "big"), device=device)
    dist.broadcast(seed, src=dist.get_global_rank(dim_group, 0), group=dim_group)
    tracker.add(HEAD_PARALLEL_RNG, int(seed))
