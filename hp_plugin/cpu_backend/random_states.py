"""Makes the CPU generator the one that `torch.cuda` and Megatron's trackers seed, save and restore.

On the CPU dropout and initialization draw from the default CPU generator, so that is the generator which has to
differ, or agree, between ranks. Nothing may then advance it on some ranks only.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from hp_plugin.cpu_backend.hook import MEGATRON, TORCH, Hook

_RANDOM = "megatron.core.tensor_parallel.random"
_TRACKER_WARNING = "CPU RNG state changed within GPU RNG context"
_DEVICE = "Megatron-Core draws from the generator of the device it runs on"


def seed_cpu(original: Callable[..., Any]) -> Callable[..., None]:
    """`torch.cuda.manual_seed` and `manual_seed_all`."""

    def manual_seed(seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    return manual_seed


def get_cpu_state(original: Callable[..., Any]) -> Callable[..., torch.Tensor]:
    """`torch.cuda.get_rng_state` and Megatron's own reader; a copy either way, so `clone` is always done."""

    def get_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.default_generator.get_state()

    return get_state


def set_cpu_state(original: Callable[..., Any]) -> Callable[..., None]:
    """`torch.cuda.set_rng_state` and Megatron's own writer, which would wait for a CUDA context for ever."""

    def set_state(new_state: torch.Tensor, device: Any = "cuda", graph_safe: bool = False) -> None:
        torch.default_generator.set_state(new_state)

    return set_state


def keep_fork_quiet(original: Callable[..., Any]) -> Callable[..., Any]:
    """`CudaRNGStatesTracker.fork` as it is; its warning that CPU and GPU states mix is what this backend does."""
    logging.getLogger(_RANDOM).addFilter(lambda record: record.getMessage() != _TRACKER_WARNING)
    return original


def load_from_own_generator(original: Callable[..., None]) -> Callable[..., None]:
    """`DataLoader.__init__`, with a generator of its own where none is given.

    Its iterators draw a seed from the default generator, and often only one rank of a TP group has a loader:
    the dropout masks of the others would no longer be the same.
    """

    signature = inspect.signature(original)

    @wraps(original)
    def init(*args: Any, **kwargs: Any) -> None:
        call = signature.bind(*args, **kwargs)
        if call.arguments.get("generator") is None:
            call.arguments["generator"] = torch.Generator().manual_seed(torch.initial_seed())
        original(*call.args, **call.kwargs)

    return init


HOOKS = [
    Hook("torch.cuda", "manual_seed", seed_cpu, _DEVICE, TORCH, ("seed",)),
    Hook("torch.cuda", "manual_seed_all", seed_cpu, _DEVICE, TORCH, ("seed",)),
    Hook("torch.cuda", "get_rng_state", get_cpu_state, _DEVICE, TORCH, ("device",)),
    Hook("torch.cuda", "set_rng_state", set_cpu_state, _DEVICE, TORCH, ("new_state", "device")),
    Hook(_RANDOM, "_get_cuda_rng_state", get_cpu_state, _DEVICE, MEGATRON, ("device", "clone", "graph_safe")),
    Hook(_RANDOM, "_set_cuda_rng_state", set_cpu_state, _DEVICE, MEGATRON, ("new_state", "device", "graph_safe")),
    Hook(
        f"{_RANDOM}.CudaRNGStatesTracker",
        "fork",
        keep_fork_quiet,
        until=_DEVICE,
        made_for=MEGATRON,
        parameters=("self", "name"),
        fragment=(f"{_RANDOM}.CudaRNGStatesTracker.fork", _TRACKER_WARNING),
    ),
    Hook(
        "torch.utils.data.DataLoader",
        "__init__",
        load_from_own_generator,
        until="the iterators of DataLoader leave the default generator alone",
        made_for=TORCH,
        parameters=("self", "dataset", "generator"),
    ),
]
