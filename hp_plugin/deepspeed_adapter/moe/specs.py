"""Takes stock MoE layer specs and returns them with DeepSpeed-MoE for Megatron's."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.moe.moe_layer import MoELayer

from hp_plugin.deepspeed_adapter.moe.layer import DeepSpeedMoELayer
from hp_plugin.deepspeed_adapter.moe.options import DeepSpeedMoEOptions
from hp_plugin.upstream.spec_tree import Replacement, with_replacements


def deepspeed_moe_spec(spec: Any, options: DeepSpeedMoEOptions | None = None, required: bool = True) -> Any:
    """Any layer or block spec with every stock `MoELayer` replaced; its other layers and modules stay what they are.

    Args:
        spec: a stock spec made with `num_experts` and without grouped GEMM, with stock attention or the grid's.
        options: what only DeepSpeed has.
        required: whether a spec without MoE layers is a mistake; a pipeline stage may have none.

    Raises:
        ValueError: the spec has no MoE layer, and one is required.
    """
    ours = Replacement(DeepSpeedMoELayer, {"options": options or DeepSpeedMoEOptions()})
    swapped = with_replacements(spec, {MoELayer: ours})
    if swapped is spec and required:
        raise ValueError(f"the layer spec {spec!r} has no megatron.core MoELayer that DeepSpeed-MoE could replace")
    return swapped
