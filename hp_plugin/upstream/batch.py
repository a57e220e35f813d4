"""A batch's share of a context-parallel rank.

From 0.18 on the function asks whether sequences are packed for hybrid context parallelism, and takes no group for all
ranks instead of for the registered context-parallel group. Can go with 0.17.
"""

from __future__ import annotations

import inspect
from typing import Any

from megatron.core import parallel_state
from megatron.core.utils import get_batch_on_this_cp_rank

_TAKEN = inspect.signature(get_batch_on_this_cp_rank).parameters


def batch_on_this_cp_rank(batch: dict[str, Any]) -> dict[str, Any]:
    """The part of `[b, s]` tensors that this context-parallel rank computes; the batch itself without that parallelism.

    The sequences are whole: nothing is packed.
    """
    known = {"is_hybrid_cp": False, "cp_group": parallel_state.get_context_parallel_group()}
    share: dict[str, Any] = get_batch_on_this_cp_rank(
        batch, **{name: value for name, value in known.items() if name in _TAKEN}
    )
    return share
