"""The rotary embedding of a Hugging Face configuration, as flags of Megatron-LM can say it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hp_plugin.refusal import shown


def rotary_fields(get: Callable[[str], Any]) -> tuple[dict[str, Any], list[str]]:
    """Fields of `ModelShape`, and what no flag builds; `get` gives a field of the configuration.

    Raises:
        ValueError: a base or share that is no positive number.
    """
    together = _table("rope_parameters", get("rope_parameters"))
    together = _table("rope_parameters", together.get("full_attention", together))
    scaling = _table("rope_scaling", get("rope_scaling")) or together
    base = together.get("rope_theta") or get("rope_theta") or 10000.0
    share = together.get("partial_rotary_factor") or get("partial_rotary_factor") or 1.0
    base, share = _number("rope_theta", base), _number("partial_rotary_factor", share)
    found: dict[str, Any] = {"rotary_base": round(base), "rotary_percent": float(share)}
    scaled, unbuilt = _scaling(scaling)
    return found | scaled, unbuilt


def _table(name: str, value: object) -> Mapping[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"{name} takes an object, got {shown(value)}")
    return value or {}


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1e30:
        raise ValueError(f"{name} takes a positive number, got {shown(value)}")
    return value


def _scaling(scaling: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    factor = scaling.get("factor", 1)
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 < factor <= 1e30:
        raise ValueError(f"rotary scaling takes a positive factor, got {shown(factor)}")
    if kind == "default" or (kind != "longrope" and factor == 1):
        return {}, ["rotary sections for images (mrope_section)"] if "mrope_section" in scaling else []
    if kind == "llama3":
        # Megatron-Core's scaling has Llama 3's own frequency factors and context.
        own = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        if all(scaling.get(name, value) == value for name, value in own.items()):
            return {"rotary_scaling": float(factor)}, []
    if kind == "linear" and float(factor).is_integer():
        return {"rotary_interpolation": int(factor)}, []
    return {}, [f"rotary scaling {shown(kind)} by {factor:g}"]
