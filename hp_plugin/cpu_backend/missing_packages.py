"""Spares Megatron-Core the names of packages that exist for CUDA only (Transformer Engine, FlashAttention)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

from hp_plugin.cpu_backend.hook import MEGATRON, Hook

_RANDOM = "megatron.core.tensor_parallel.random"
_LATENT = "megatron.core.transformer.multi_latent_attention"


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


def latent_attention_without_transformer_engine(original: Callable[..., None]) -> Callable[..., None]:
    """`MultiLatentAttention.__init__`, which asks a linear whether it is of a class that is a mock without it."""

    @wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        module = sys.modules[_LATENT]
        there = isinstance(getattr(module, "TELinear", None), type)
        module.HAVE_TE = module.HAVE_TE and there  # type: ignore[attr-defined]
        original(self, *args, **kwargs)

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
    Hook(
        f"{_LATENT}.MultiLatentAttention",
        "__init__",
        latent_attention_without_transformer_engine,
        until="HAVE_TE says there whether Transformer Engine is",
        made_for=MEGATRON,
        parameters=("self", "config", "submodules", "layer_number", "attn_mask_type", "attention_type"),
        fragment=(_LATENT, "isinstance(self.linear_proj, TELinear)"),
    ),
]
