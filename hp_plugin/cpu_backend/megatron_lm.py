"""What Megatron-LM's own training code needs on the CPU, beyond Megatron-Core; its trees must be on `sys.path`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any
from unittest import mock

from hp_plugin import cpu_backend
from hp_plugin.cpu_backend.devices import ignore
from hp_plugin.cpu_backend.hook import Hook
from hp_plugin.cpu_backend.mixture_of_experts import uneven_gathers
from hp_plugin.processes.refusals import refuse

MEGATRON_LM = ("megatron-core", "0.16.1")
_KERNELS = (
    "megatron.core.transformer.custom_layers.batch_invariant_kernels",
    "megatron.core.inference.contexts.attention_context.triton.tensor_ops",
)
_FUSED = "megatron.legacy.fused_kernels"
_ASKS = "Megatron-LM initializes on machines without CUDA"


def allow_no_cuda(original: Callable[..., Any]) -> Callable[..., Any]:
    """`initialize_megatron`, told what it otherwise takes for a mistake."""

    @wraps(original)
    def initialize_megatron(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **{**kwargs, "allow_no_cuda": True})

    return initialize_megatron


def count_one_device(original: Callable[..., Any]) -> Callable[..., Any]:
    """A function that makes process groups, or seeds generators, only where it counts a device."""

    @wraps(original)
    def with_one_device(*args: Any, **kwargs: Any) -> Any:
        with mock.patch("torch.cuda.device_count", return_value=1):
            return original(*args, **kwargs)

    return with_one_device


def refuse_uneven_gathers(original: Callable[..., Any]) -> Callable[..., Any]:
    """A function that makes process groups, ended as a parser's error is where gloo cannot serve Megatron's experts."""

    @wraps(original)
    def with_even_gathers(*args: Any, **kwargs: Any) -> Any:
        given = import_module("megatron.training").get_args()
        slices = given.expert_tensor_parallel_size or given.tensor_model_parallel_size
        uneven = None if given.num_experts is None else uneven_gathers(given.expert_model_parallel_size, slices)
        if uneven is None:
            return original(*args, **kwargs)
        refuse(uneven, sys.argv[0])

    return with_even_gathers


def describe_cpu(original: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.cuda.get_device_properties`: no architecture, and the first one; nothing newer is taken for granted."""
    return lambda device=None: SimpleNamespace(name="cpu", major=0, minor=0, total_memory=0)


def _import_kernels() -> None:
    """Imports modules of Triton kernels, which Megatron-LM imports without asking, where there is no Triton.

    Their kernels are for CUDA: behind `--batch-invariant-mode`, and of Mamba's dynamic batches. 0.17.0 and later ask
    first.
    """
    if find_spec("triton") is not None:
        return
    for kernels in filter(_is_there, _KERNELS):  # which imports the packages around it: they must not see a Triton
        stand_ins = {name: mock.MagicMock(name=name) for name in ("triton", "triton.language")}
        sys.modules.update(stand_ins)
        try:
            import_module(kernels)
        finally:
            # Nothing else may take Triton for installed.
            for name in stand_ins:
                del sys.modules[name]


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # nor is the package around it: 0.18 and later have no megatron.legacy
        return False


def enable(megatron_experts: bool = True) -> None:
    """`cpu_backend.enable()`, and the same for Megatron-LM's training code.

    Args:
        megatron_experts: whether mixtures of experts are Megatron's own, which gather what gloo cannot on some groups.

    Raises:
        ModuleNotFoundError: there is no `megatron.training`.
        RuntimeError: as `cpu_backend.enable`.
    """
    # First, so that what its import lacks is said as it is.
    _import_kernels()
    import_module("megatron.training.training")
    cpu_backend.enable()
    # 0.17.0 and later have no fused kernels of their own to compile.
    hooks = [hook for hook in HOOKS if hook.owner != _FUSED or _is_there(_FUSED)]
    hooks += [UNEVEN_GATHERS] if megatron_experts else []
    for hook in hooks:
        hook.check()
    for hook in hooks:
        hook.apply()


UNEVEN_GATHERS = Hook(
    "megatron.training.initialize",
    "_initialize_distributed",
    refuse_uneven_gathers,
    "gloo gathers unequal numbers of elements",
    MEGATRON_LM,
)
# Scripts take it from its own module; pretraining has it by name already.
_INITIALIZE = ("megatron.training.initialize", "megatron.training.training")
HOOKS = [
    *(
        Hook(owner, "initialize_megatron", allow_no_cuda, _ASKS, MEGATRON_LM, ("allow_no_cuda",))
        for owner in _INITIALIZE
    ),
    Hook("megatron.training.initialize", "_initialize_distributed", count_one_device, _ASKS, MEGATRON_LM),
    Hook("megatron.training.initialize", "_set_random_seed", count_one_device, _ASKS, MEGATRON_LM),
    Hook(_FUSED, "load", ignore, "Megatron-LM compiles no CUDA kernels of its own (0.17.0)", MEGATRON_LM, ("args",)),
    Hook("torch.cuda", "get_device_properties", describe_cpu, _ASKS, MEGATRON_LM),
]
