"""Lets stock Megatron-Core train on the CPU over gloo, once `enable()` is called; importing it changes nothing.

Megatron-Core names CUDA in about eighty places. Each list of hooks below answers one kind of them, for the whole
process; what runs on the CPU is upstream's own code. Functions given to `torch.compile` run as they are written,
since compiling the handful that Megatron-Core marks costs every rank more than they ever take.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

from hp_plugin.cpu_backend import (
    communication,
    cuda_calls,
    devices,
    missing_packages,
    mixture_of_experts,
    optimizer_steps,
    random_states,
)
from hp_plugin.cpu_backend.hook import Hook
from hp_plugin.cpu_backend.missing_packages import recompute_without_fp8
from hp_plugin.cpu_backend.mixture_of_experts import without_te_gemm
from hp_plugin.processes.scheduling import take_turns

__all__ = ["HOOKS", "Hook", "enable", "is_enabled", "mend_missing_packages"]

HOOKS: list[Hook] = [
    *devices.HOOKS,
    *cuda_calls.HOOKS,
    *random_states.HOOKS,
    *communication.HOOKS,
    *missing_packages.HOOKS,
    *optimizer_steps.HOOKS,
    *mixture_of_experts.HOOKS,
]

PACKAGE_HOOKS = [hook for hook in HOOKS if hook.replacement in (recompute_without_fp8, without_te_gemm)]
"""Those for missing packages, which machines with CUDA lack, too."""

_enabled = _mended = False


def is_enabled() -> bool:
    """True once `enable()` has succeeded in this process."""
    return _enabled


def enable() -> None:
    """Run Megatron-Core on the CPU from now on, in this process; does nothing the second time.

    Best called before process groups are made: the threads that they start then share the cores as
    `processes.scheduling` says.

    Raises `RuntimeError`, having changed nothing, if torch sees a CUDA device, or if an upstream function that
    would be replaced does not look as it did in the release that the replacement was written for.
    """
    global _enabled
    if _enabled:
        return
    if torch.cuda.is_available():
        raise RuntimeError(
            f"the CPU backend is for machines without CUDA, and torch sees {torch.cuda.device_count()} CUDA "
            "device(s): train on them, or hide them from this process with CUDA_VISIBLE_DEVICES="
        )
    chosen = "TORCHDYNAMO_DISABLE" in os.environ
    # Before the checks, which import Megatron-Core if nobody has: loading the compiler is 0.8 s of a rank's start of 3.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    try:
        for hook in HOOKS:
            hook.check()
    except Exception:
        if not chosen:
            del os.environ["TORCHDYNAMO_DISABLE"]
        raise
    for hook in HOOKS:
        hook.apply()
    # For what was to be compiled earlier.
    torch.compiler.set_stance("force_eager")
    take_turns()
    _enabled = True


def mend_missing_packages() -> None:
    """What Megatron-Core needs on any device where Transformer Engine is not installed; twice is once.

    Raises `RuntimeError`, having changed nothing, as `enable` does.
    """
    global _mended
    if _mended or find_spec("transformer_engine") is not None:
        return
    for hook in PACKAGE_HOOKS:
        hook.check()
    for hook in PACKAGE_HOOKS:
        hook.apply()
    _mended = True
