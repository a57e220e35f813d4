"""What the planner predicts for a layout on the machine that `compare` has just measured, beside what it took."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from hp_plugin.compare.entries.entrant import FUNCTION_MARK, Entrant
from hp_plugin.compare.entries.planned import share_of
from hp_plugin.planner.machine.hardware import Hardware
from hp_plugin.planner.seconds.step import predict

HEAD = ("layout", "tokens/s", "predicted", "error", "ratio", "predicted", "error", "TPOT ms", "predicted")


def predicted_rates(entrant: Entrant, mode: str, hardware: Hardware) -> dict[str, float]:
    """Seconds of a step, tokens/s and TPOT in ms; norms and activations unfused, as stock runs them on the CPU."""
    share = share_of(entrant, mode)
    found = predict(share.model, replace(share.layout, fused=False), share.workload, hardware)
    return {"step_s": found.step, "tokens_per_s": found.tokens_per_s, "tpot_ms": found.tpot * 1e3}


def prediction_rows(layouts: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """One mode's cells, a row per layout: rates, ratios to the first layout, and how far the prediction is off."""
    first = next(iter(layouts.values()))
    for name, one in layouts.items():
        rate, guess = one["tokens_per_s"]["median"], one["predicted"]["tokens_per_s"]
        ratio = rate / first["tokens_per_s"]["median"]
        guessed = guess / first["predicted"]["tokens_per_s"]
        yield (
            name if one["exact"] else f"{name} {FUNCTION_MARK}",
            f"{rate:,.0f}",
            f"{guess:,.0f}",
            f"{guess / rate - 1:+.0%}",
            f"{ratio:.2f}",
            f"{guessed:.2f}",
            f"{guessed / ratio - 1:+.0%}",
            f"{one['tpot_ms']['median']:.3f}",
            f"{one['predicted']['tpot_ms']:.3f}",
        )


def winners(layouts: dict[str, Any]) -> str:
    """Which exact layout is the fastest, measured and predicted."""
    exact = {name: one for name, one in layouts.items() if one["exact"]}
    if len(exact) < 2:
        return ""
    measured = max(exact, key=lambda name: exact[name]["tokens_per_s"]["median"])
    expected = max(exact, key=lambda name: exact[name]["predicted"]["tokens_per_s"])
    if measured == expected:
        return f"Fastest, measured and predicted: {measured}."
    return f"Fastest: {measured}; predicted: {expected}."


def has_predictions(layouts: dict[str, Any]) -> bool:
    """Whether `--predict` was on."""
    return all(one["predicted"] for one in layouts.values())
