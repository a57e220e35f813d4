"""Random numbers that some ranks of a grid share and others must not."""

from __future__ import annotations

import hashlib

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.random import _MODEL_PARALLEL_RNG_TRACKER_NAME

HEAD_PARALLEL_RNG = "head-parallel-rng"
"""Tracker state that is equal on the n ranks of a dim group and differs between the m ranks of a head group.

For scores of which the ranks of a dim group hold partial sums: they must drop the same ones.
"""
DIM_PARALLEL_RNG = "dim-parallel-rng"
"""Tracker state that is equal on the m ranks of a head group and differs between the n ranks of a dim group.

For hidden states that a head group holds alike, while the ranks of a dim group hold different tokens.
"""


def ensure_rng(name: str, sharing: dist.ProcessGroup) -> None:
    """Adds a state to Megatron-Core's RNG tracker, seeded from rank 0 of the group that shares it, unless it is there.

    One broadcast of an integer over the group in the first forward pass after seeding, none later. Recompute of that
    pass finds the tracker as it was before it, and derives the same state again.

    Raises:
        RuntimeError: the tracker has not been seeded yet (`model_parallel_cuda_manual_seed`).
    """
    tracker = get_cuda_rng_tracker()
    states = tracker.get_states()
    if name in states:
        return
    if _MODEL_PARALLEL_RNG_TRACKER_NAME not in states:
        raise RuntimeError(
            "dropout on a grid needs Megatron-Core's RNG tracker: call "
            "tensor_parallel.model_parallel_cuda_manual_seed(seed) before training"
        )
    model_state = states[_MODEL_PARALLEL_RNG_TRACKER_NAME]
    as_generator = isinstance(model_state, torch.Generator)  # trackers made for CUDA graphs keep generators
    raw = model_state.get_state() if as_generator else model_state
    digest = hashlib.sha256(name.encode() + raw.cpu().numpy().tobytes()).digest()
    seed = torch.tensor(
        int.from_bytes(digest[:7], "big"), device="cuda" if dist.get_backend(sharing) == "nccl" else "cpu"
    )
    dist.broadcast(seed, src=dist.get_global_rank(sharing, 0), group=sharing)
    # Not the seed's device: over gloo, too, ranks on a GPU draw from its generator.
    generator = torch.Generator(device="cuda" if torch.cuda.is_available() else "cpu").manual_seed(int(seed))
    tracker.set_states({**states, name: generator if as_generator else generator.get_state()})
