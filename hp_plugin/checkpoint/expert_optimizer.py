"""Keeps optimizer state of experts from layouts whose optimizers it does not fit, where upstream ends in a trace.

Can go once Megatron-Core's `ChainedOptimizer` loads the state of another number of optimizers than it has.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.core import parallel_state

from hp_plugin.checkpoint.checks import refuse_together

_APART, _TOGETHER = "have an optimizer of their own", "share one with all other weights"
_WHERE = {
    _APART: "--expert-model-parallel-size above 1, --expert-tensor-parallel-size below the TP size, or --moe-backend "
    "deepspeed",
    _TOGETHER: "Megatron's experts, --expert-model-parallel-size 1 and --expert-tensor-parallel-size equal to the TP "
    "size",
}
_SIZES = ("tensor_model_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size")


def check_expert_optimizer(
    sharded_state_dict: Mapping[str, Any], stored: Mapping[str, Any], folder: str | Path
) -> None:
    """Refuses optimizer state in another number of optimizers than this run has; a collective call.

    Megatron-Core gives experts an optimizer of their own where other ranks hold them than hold the dense weights, and
    numbers the optimizers' hyperparameters in the checkpoint only where there are several. The tensors themselves fit
    every layout.

    Args:
        sharded_state_dict: what is to be loaded, as `dist_checkpointing.load` takes it; nothing is refused without
            optimizer state in it, nor of a checkpoint whose arguments name no experts.
        stored: the checkpoint's common state.

    Raises:
        WrongModelError: names both sides, the layouts that load it and the way to load the weights alone.
    """
    own, theirs, saved = sharded_state_dict.get("optimizer"), stored.get("optimizer"), stored.get("args")
    if own is None or theirs is None or getattr(saved, "num_experts", None) is None:  # the same on all ranks
        return
    complaints = []
    if _arrangement(own) != _arrangement(theirs):
        complaints.append(
            f"experts {_arrangement(theirs)} there{_sizes([getattr(saved, name, None) for name in _SIZES])}, and "
            f"{_arrangement(own)} here{_sizes(_own_sizes())}; it loads with {_WHERE[_arrangement(theirs)]}. Weights "
            "alone load on every layout: give --finetune"
        )
    refuse_together(complaints, folder, "keeps its optimizer state otherwise")


def _arrangement(optimizer: Mapping[Any, Any]) -> str:
    # Several optimizers are numbered; the state of a single one has names.
    return _APART if 1 in optimizer else _TOGETHER


def _own_sizes() -> list[int]:
    return [
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_expert_model_parallel_world_size(),
        parallel_state.get_expert_tensor_parallel_world_size(),
    ]


def _sizes(found: list[int | None]) -> str:
    tensor, experts, slices = found
    # Unset, the size of expert tensor groups is the TP size.
    return "" if None in (tensor, experts) else f" (TP {tensor}, EP {experts}, expert TP {slices or tensor})"
