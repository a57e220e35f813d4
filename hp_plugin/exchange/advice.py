"""What an exchange cannot do for a model, and which others can: found by asking them for all of it, or not named."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hp_plugin.exchange.rules import AUTO_ORDER, RULES, way_out
from hp_plugin.exchange.sizes import AttentionShape
from hp_plugin.refusal import Refusal


def unsupported_by(
    name: str, config: Any, alone: tuple[str, ...], shape: AttentionShape | None = None
) -> Iterator[Refusal]:
    """What a model asks for and this exchange cannot do, whatever the micro-batch, each with the others that can.

    Args:
        config: the model's configuration, or arguments under the same names.
        alone: what it asks for that only stock's inner attention does, each after "cannot".
        shape: a layer's shape if it is known; otherwise the others are named on the condition that they fit it.
    """
    reasons = list(_reasons(name, config, alone))
    if not reasons:
        return
    others = [
        other
        for other in AUTO_ORDER
        if not any(_reasons(other, config, alone)) and (shape is None or RULES[other].refusal(shape) is None)
    ]
    advice = way_out(others, " where it fits" if shape is None else "")
    for reason in reasons:
        yield Refusal("feature", f"exchange `{name}` cannot {reason}{advice}")


def _reasons(name: str, config: Any, alone: tuple[str, ...]) -> Iterator[str]:
    rule = RULES[name]
    if not rule.exact and hasattr(config, "yarn_rotary_scaling_factor"):
        yield "place YaRN frequencies on slices"
    yield from rule.cannot(config)
    if not rule.stock_core:
        yield from alone
