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

    One broadcast of an integer over the dim axis in the first forward pass after seeding, none later. Recompute of that
    pass finds the tracker as it was before it, and derives the same state again.

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
            "tensor_parallel.model_parallel_cuda_manual_seed(seed) before training"
        )
    model_state = states[_MODEL_PARALLEL_RNG_TRACKER_NAME]
    as_generator = isinstance(model_state, torch.Generator)  # trackers made for CUDA graphs keep generators
    raw = model_state.get_state() if as_generator else model_state
    digest = hashlib.sha256(raw.cpu().numpy().tobytes()).digest()
    device = torch.device("cuda" if dist.get_backend(dim_group) == "nccl" else "cpu")
    seed = torch.tensor(int.from_bytes(digest[:7], "big"), device=device)
    dist.broadcast(seed, src=dist.get_global_rank(dim_group, 0), group=dim_group)
    generator = torch.Generator(device=device).manual_seed(int(seed))
    tracker.set_states({**states, HEAD_PARALLEL_RNG: generator if as_generator else generator.get_state()})
