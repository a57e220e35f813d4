"""DeepSpeed-MoE's weights under the keys of stock Megatron MoE, with global expert numbers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from deepspeed.moe.layer import MoE
from megatron.core import parallel_state
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint

_GATE = "deepspeed_moe.gate.wg."
_EXPERTS = "deepspeed_moe.experts.deepspeed_experts."


def sharded_moe_state(
    layer: MoE, prefix: str, sharded_offsets: tuple[Any, ...], metadata: dict[str, Any] | None
) -> dict[str, Any]:
    """What this rank holds of an MoE layer, for `megatron.core.dist_checkpointing`.

    The gate is stock's `router.weight` and the experts are stock's `experts.experts.…`, numbered over the whole model:
    a checkpoint moves between expert groups, grids, and DeepSpeed's and Megatron's MoE.

    Source: `megatron.core.transformer.moe.experts.SequentialMLP.sharded_state_dict`, which does the numbering.
    """
    metadata = ensure_metadata_has_dp_cp_group(metadata)
    gate = make_sharded_tensors_for_checkpoint(
        layer.deepspeed_moe.gate.wg.state_dict(prefix="", keep_vars=True),
        f"{prefix}router.",
        {},
        sharded_offsets,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        dp_cp_group=metadata["dp_cp_group"],
    )
    stock = SimpleNamespace(
        local_experts=layer.deepspeed_moe.experts.deepspeed_experts,
        num_local_experts=layer.num_local_experts,
        ep_group=parallel_state.get_expert_model_parallel_group(),
        dp_group=parallel_state.get_expert_data_parallel_group(),
    )
    experts = SequentialMLP.sharded_state_dict(stock, f"{prefix}experts.", sharded_offsets, metadata)
    # Global keys are inside the values; the names outside are the module's own, which loading looks for.
    own = {f"{prefix}router.": prefix + _GATE, f"{prefix}experts.local_experts.": prefix + _EXPERTS}
    return {_renamed(name, own): value for name, value in {**gate, **experts}.items()}


def _renamed(name: str, prefixes: dict[str, str]) -> str:
    for stock, own in prefixes.items():
        if name.startswith(stock):
            return own + name.removeprefix(stock)
    raise AssertionError(f"{name} is no part of a stock MoE layer")
