"""Keeps gloo's sends safe from what Megatron's pipeline schedules do to a tensor after handing it to NCCL."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from hp_plugin.cpu_backend.hook import MEGATRON, TORCH, Hook


def send_own_reference(original: Callable[..., Any]) -> Callable[..., Any]:
    """`isend`, of a second reference to the same memory.

    The interleaved schedule frees an output's memory (`out.data = ...`) while its send is under way. On CUDA the
    stream keeps that in order; gloo would go on reading freed memory, but keeps the tensor that it was given.
    """

    @wraps(original)
    def isend(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return original(tensor.detach(), *args, **kwargs)

    return isend


_UNTIL = "deallocate_output_tensor waits for the send"
_SENDS = ("tensor", "dst", "group", "tag", "group_dst")
_FRAGMENT = ("megatron.core.pipeline_parallel.schedules.deallocate_output_tensor", "out.data = torch.empty(")

# The same function under both names: P2POp compares what it is given with the second.
HOOKS = [
    Hook("torch.distributed", "isend", send_own_reference, _UNTIL, TORCH, _SENDS),
    Hook(
        "torch.distributed.distributed_c10d",
        "isend",
        lambda original: torch.distributed.isend,
        _UNTIL,
        MEGATRON,
        _SENDS,
        _FRAGMENT,
    ),
]
