"""Spares CPU runs the C++ extension that DeepSpeed compiles when it starts, and does not train with."""

from __future__ import annotations

import deepspeed

from hp_plugin import cpu_backend

# Shared-memory all-reduce for inference. Building it takes half a minute and a compiler, and a build that was killed
# leaves a lock that the next start waits on for ever.
_OPERATOR = "deepspeed_shm_comm"


def skip_inference_extension() -> None:
    """Tells DeepSpeed that its shared-memory extension is not there, if Megatron-Core runs on the CPU backend."""
    if cpu_backend.is_enabled() and _OPERATOR in deepspeed.ops.__compatible_ops__:
        deepspeed.ops.__compatible_ops__[_OPERATOR] = False
