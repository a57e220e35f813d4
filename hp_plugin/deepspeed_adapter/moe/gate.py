"""DeepSpeed's gate, fed with common random numbers, and with room for the split over tensor-parallel ranks."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from deepspeed.moe.sharded_moe import TopKGate
from deepspeed.utils import groups
from deepspeed.utils.bwc import bwc_tensor_model_parallel_world_size
from megatron.core.tensor_parallel import get_cuda_rng_tracker, get_data_parallel_rng_tracker_name
from torch import Tensor


class GridGate(TopKGate):
    """`TopKGate` whose routing is the same on all ranks that hold the same tokens; decides nothing itself.

    DeepSpeed cuts every expert's buffer of C slots into P parts, one for each tensor-parallel rank, and insists that P
    divides C. The buffer is rounded up here, after the gate has decided by its own capacity who is dropped: the slots
    added stay empty.

    Raises:
        RuntimeError: this DeepSpeed release has no sparse routes, or the gate needs random numbers and
            `model_parallel_cuda_manual_seed` was not called.
    """

    dropped: Tensor | None = None
    """Share of (token, expert) choices that found their expert full in the last forward pass; a scalar tensor."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if "sparse_routes" not in inspect.signature(TopKGate.forward).parameters:
            raise RuntimeError("this DeepSpeed release has no sparse MoE routes: install deepspeed 0.19.8 or newer")

    def forward(
        self, input: Tensor, used_token: Tensor | None = None, sparse_routes: bool = False, use_tutel: bool = False
    ) -> tuple[Any, ...]:
        """Tokens `[t, D]` to (aux loss, slots, experts, then per choice `[k, t]` expert, slot and weight; counts)."""
        assert sparse_routes, "DeepSpeed's MOELayer asks for sparse routes"
        with self._common_random_numbers():
            routed = super().forward(input, used_token, sparse_routes, use_tutel)
        loss, capacity, *rest = routed
        counts = rest[-1]
        self.dropped = (counts - capacity).clamp(min=0).sum() / counts.sum()
        ranks = bwc_tensor_model_parallel_world_size(groups.mpu)
        return (loss, -(-capacity // ranks) * ranks, *rest)

    def _common_random_numbers(self) -> AbstractContextManager[None]:
        """Megatron's stream that is equal on all ranks of a TP group, where the gate draws random numbers at all."""
        draws = (
            (self.k == 1 and self.use_rts)
            or (self.k == 2 and self.top2_2nd_expert_sampling)
            or (self.noisy_gate_policy is not None and self.training)
        )
        if not draws:
            return nullcontext()
        tracker, stream = get_cuda_rng_tracker(), get_data_parallel_rng_tracker_name()
        if stream not in tracker.get_states():
            raise RuntimeError(
                "the gate draws random numbers, which must agree within a TP group: call "
                "megatron.core.tensor_parallel.model_parallel_cuda_manual_seed(seed) first"
            )
        return tracker.fork(stream)
