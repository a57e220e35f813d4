"""Takes stock MoE layer specs and returns them with DeepSpeed-MoE for Megatron's."""

from __future__ import annotations

import copy
from dataclasses import fields, is_dataclass, replace
from typing import Any

from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec

from hp_plugin.deepspeed_adapter.moe.layer import DeepSpeedMoELayer
from hp_plugin.deepspeed_adapter.moe.options import DeepSpeedMoEOptions


def deepspeed_moe_spec(spec: Any, options: DeepSpeedMoEOptions | None = None, required: bool = True) -> Any:
    """Any layer or block spec with every stock `MoELayer` replaced; its other layers and modules stay what they are.

    Args:
        spec: a stock spec made with `num_experts` and without grouped GEMM, with stock attention or the grid's.
        options: what only DeepSpeed has.
        required: whether a spec without MoE layers is a mistake; a pipeline stage may have none.

    Raises:
        ValueError: the spec has no MoE layer, and one is required.
    """
    swapped = _swapped(spec, {"options": options or DeepSpeedMoEOptions()})
    if swapped is spec and required:
        raise ValueError(f"the layer spec {spec!r} has no megatron.core MoELayer that DeepSpeed-MoE could replace")
    return swapped


def _swapped(spec: Any, params: dict[str, Any]) -> Any:
    """A copy of a spec tree with MoE layers replaced; the very same object where there are none."""
    if isinstance(spec, ModuleSpec) and spec.module is MoELayer:
        return replace(spec, module=DeepSpeedMoELayer, params={**spec.params, **params})
    if isinstance(spec, (list, tuple)):
        items = [_swapped(item, params) for item in spec]
        changed = any(new is not old for new, old in zip(items, spec, strict=True))
        return type(spec)(items) if changed else spec
    if isinstance(spec, type) or not is_dataclass(spec):
        return spec
    names = ["submodules"] if isinstance(spec, ModuleSpec) else [field.name for field in fields(spec)]
    changes = {name: _swapped(getattr(spec, name), params) for name in names}
    if all(new is getattr(spec, name) for name, new in changes.items()):
        return spec
    result = copy.copy(spec)
    for name, new in changes.items():
        setattr(result, name, new)
    return result
