"""Spares Megatron-Core the names of packages that exist for CUDA only (Transformer Engine, FlashAttention)."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from hp_plugin.cpu_backend.hook import MEGATRON, Hook

_RANDOM = "megatron.core.tensor_parallel.random"


def recompute_without_fp8(original: Callable[..., None]) -> Callable[..., None]:
    """`CheckpointWithoutOutput.__init__`, which takes its own default, `fp8=False`, for a wish for FP8.

    It then asks Transformer Engine for FP8's state, so that recomputing a norm alone fails without that package.
    """

    @wraps(original)
    def init(self: Any, fp8: Any = None) -> None:
        original(self, fp8 or None)

    return init


def refuse_pages(original: Callable[..., None]) -> Callable[..., None]:
    """`DynamicInferenceContext.__init__`, which reserves gigabytes for what attention then has no kernel for.

    Megatron-Core's `StaticInferenceEngine` goes on with static batches by itself where it raises.
    """

    @wraps(original)
    def init(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError(
            "dynamic batching attends by kernels of FlashAttention, which are for GPUs: use static batches"
        )

    return init


HOOKS = [
    Hook(
        "megatron.core.inference.contexts.dynamic_context.DynamicInferenceContext",
        "__init__",
        refuse_pages,
        until="it asks for FlashAttention before it reserves memory",
        made_for=MEGATRON,
    ),
    Hook(
        f"{_RANDOM}.CheckpointWithoutOutput",
        "__init__",
        recompute_without_fp8,
        until="the constructor takes False for no FP8",
        made_for=MEGATRON,
        parameters=("self", "fp8"),
        fragment=(f"{_RANDOM}.CheckpointWithoutOutput.__init__", "self.fp8 = fp8 is not None"),
    ),
]
