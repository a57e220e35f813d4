"""How a release writes a checkpoint in the background, and where it keeps what is not sharded.

From 0.17 on a save in the background is by default NVIDIA's resiliency extension's, whose requests Megatron-Core's own
queue does not take. From 0.19 on the common state lies among the shards, under a key of the index, and `common.pt` is
read where it is found but no longer written. Can go with 0.16 and with 0.18.
"""

from __future__ import annotations

import inspect
from typing import Any

from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.metadata import Metadata

COMMON_FILE, COMMON_KEY = "common.pt", "common_state"
_SAVE = inspect.signature(dist_checkpointing.save).parameters


def own_queue() -> dict[str, Any]:
    """What `dist_checkpointing.save` is to be told so that an `AsyncCallsQueue` takes its requests."""
    return {"async_strategy": "mcore"} if "async_strategy" in _SAVE else {}


def common_state_is_sharded(index: Metadata) -> bool:
    """Whether a checkpoint keeps its common state among the shards."""
    return any(map(is_common_state, index.state_dict_metadata))


def is_common_state(key: str) -> bool:
    """Whether an index has the common state under this key."""
    return key.partition("/")[0] == COMMON_KEY


def reads_sharded_common_state() -> bool:
    """Whether this release does; it is the one that no longer asks how to write a file for it."""
    return "common_strategy" not in _SAVE
