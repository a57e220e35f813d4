"""Predicted against published: what the planner is fitted to, and how far it is off on everything else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log

from hp_plugin.planner.counts.feasibility import memory_refusal, shape_refusals
from hp_plugin.planner.counts.memory import memory_needed
from hp_plugin.planner.counts.share import Share
from hp_plugin.planner.inputs.layout import Layout
from hp_plugin.planner.machine.hardware import Hardware, load_hardware
from hp_plugin.planner.reports.published import (
    FOUNDRY,
    GPT_FAST,
    MEGATRON,
    Row,
    bridge_rows,
    decode_rows,
    foundry_rows,
    megatron_rows,
)
from hp_plugin.planner.seconds.prediction import Prediction
from hp_plugin.planner.seconds.step import predict

CALIBRATION = ("7.1 B", "16 B", "32 B")
"""The only rows that anything is fitted to: Megatron-LM's with tensor but no pipeline parallelism, so that nothing
unpublished (virtual stages) enters. One number is fitted: `gemm_efficiency`."""


@dataclass(frozen=True)
class Comparison:
    """A published row beside its prediction; `without_virtual` is the best layout without virtual stages."""

    row: Row
    role: str
    predicted: Prediction
    without_virtual: Prediction | None

    @property
    def error(self) -> float:
        """Predicted over measured, less 1."""
        return self.predicted.tokens_per_s / self.row.gpus / self.row.measured - 1.0


def compare_row(row: Row, role: str, hardware: Hardware) -> Comparison:
    """Predicts a row; where the publication leaves layouts open, the fastest that fits into memory stands for it.

    Raises:
        ValueError: none of the row's layouts fits.
    """
    machine = row.machine(hardware)
    found = [predict(row.model, layout, row.workload, machine) for layout in _open(row, hardware)]
    if not found:
        raise ValueError(f"{row.group}, {row.name}: no open layout fits into memory")
    best = max(found, key=lambda prediction: prediction.tokens_per_s)
    plain = [prediction for prediction in found if prediction.layout.vpp == 1]
    return Comparison(row, role, best, max(plain, key=lambda one: one.tokens_per_s) if plain else None)


def _open(row: Row, hardware: Hardware) -> list[Layout]:
    if len(row.layouts) == 1:
        return list(row.layouts)
    fitting = []
    for layout in row.layouts:
        share = Share.on(row.machine(hardware), row.model, layout, row.workload)
        if not shape_refusals(share) and memory_refusal(memory_needed(share), hardware) is None:
            fitting.append(layout)
    return fitting


def calibrate(hardware: Hardware, rows: Sequence[Row]) -> float:
    """The `gemm_efficiency` with the least mean squared log error over `rows`, by golden-section search."""
    chosen = [compare_row(row, "", hardware).predicted.layout for row in rows]

    def loss(efficiency: float) -> float:
        machine = hardware.with_parameter("gemm_efficiency", efficiency, "calibrated", "search")
        errors = [
            log(predict(row.model, layout, row.workload, row.machine(machine)).tokens_per_s / row.gpus / row.measured)
            for row, layout in zip(rows, chosen, strict=True)
        ]
        return sum(error * error for error in errors) / len(errors)

    low, high = 0.3, 1.0
    golden = (5**0.5 - 1) / 2
    while high - low > 1e-5:
        left, right = high - golden * (high - low), low + golden * (high - low)
        if loss(left) < loss(right):
            high = right
        else:
            low = left
    return (low + high) / 2


def calibration_rows() -> list[Row]:
    """The rows of `CALIBRATION`."""
    return [row for row in megatron_rows() if row.name in CALIBRATION]


def compare_all() -> list[Comparison]:
    """All published rows: calibration, held-out (the issue's), and the rest of the same tables (`also`)."""
    hardware = load_hardware("h100-ib")
    compared = [
        compare_row(row, "calibration" if row.name in CALIBRATION else "held out", hardware) for row in megatron_rows()
    ]
    for row in foundry_rows():
        compared.append(compare_row(row, "held out" if row.gpus == 16 else "also", hardware))
    return compared + [compare_row(row, "decode", hardware) for row in decode_rows()]


def mean_error(compared: Sequence[Comparison]) -> float:
    """Mean absolute relative error."""
    return sum(abs(comparison.error) for comparison in compared) / len(compared)


def worst_error(compared: Sequence[Comparison]) -> Comparison:
    """The row with the largest error."""
    return max(compared, key=lambda comparison: abs(comparison.error))


def validation_report(compared: Sequence[Comparison]) -> list[str]:
    """The validation as lines of text."""
    lines = [
        "Predicted against published, H100 (decode: A100), tokens/s per GPU",
        f"fitted: gemm_efficiency = {load_hardware('h100-ib')['gemm_efficiency']:.3f}, to {len(CALIBRATION)} rows "
        f"({', '.join(CALIBRATION)} of {MEGATRON}); nothing else is fitted to any row",
        "",
        f"{'row':<34}{'role':<12}{'published':>10}{'predicted':>10}{'error':>8}  layout assumed",
    ]
    for comparison in compared:
        if comparison.role != "also":
            lines.append(_line(comparison))
    for label, chosen in _groups(compared):
        worst = worst_error(chosen)
        lines.append(
            f"{label + ':':<44}{len(chosen):>3} rows, mean error {mean_error(chosen):6.1%}, "
            f"max {abs(worst.error):6.1%} ({worst.row.name})"
        )
    staged = [one for one in compared if one.row.group == MEGATRON and one.predicted.layout.pp > 1]
    lines += ["", "Not published and therefore open: micro-batch size and virtual stages of the Megatron rows; the"]
    lines.append("fastest choice that fits is taken. Without virtual stages the pipelined rows would be predicted at")
    lines.append(
        ", ".join(
            f"{one.row.name} {one.without_virtual.tokens_per_s / one.row.gpus / one.row.measured - 1:+.1%}"
            for one in staged
            if one.without_virtual is not None
        )
        + "."
    )
    return lines


def _groups(compared: Sequence[Comparison]) -> list[tuple[str, list[Comparison]]]:
    held = [one for one in compared if one.role == "held out"]
    also = [one for one in compared if one.role == "also"]
    return [
        ("calibration", [one for one in compared if one.role == "calibration"]),
        ("held out", held),
        (f"held out, {MEGATRON}", [one for one in held if one.row.group == MEGATRON]),
        (f"held out, {FOUNDRY}, 16 GPUs", [one for one in held if one.row.group == FOUNDRY]),
        ("also: other GPU counts, sequence 2048", [one for one in also if one.row.workload.seq == 2048]),
        ("also: up to 1024 tokens", [one for one in also if one.row.workload.seq < 2048]),
        ("also: from 4096 tokens", [one for one in also if one.row.workload.seq > 2048]),
        (f"{GPT_FAST}, batch 1, 1 to 8 A100", [one for one in compared if one.role == "decode"]),
    ]


def _line(comparison: Comparison) -> str:
    row, found = comparison.row, comparison.predicted
    return (
        f"{row.name:<34}{comparison.role:<12}{_rate(row.measured):>10}{_rate(found.tokens_per_s / row.gpus):>10}"
        f"{comparison.error:>+8.1%}  {found.layout}"
    )


def _rate(tokens_per_s: float) -> str:
    return f"{tokens_per_s:,.0f}" if tokens_per_s >= 1000 else f"{tokens_per_s:.1f}"


def bridge_report() -> list[str]:
    """Mixtures that NVIDIA publishes with their layouts beside predictions, which were made after everything else."""
    compared = [compare_row(row, "held out", load_hardware("h100-ib")) for row in bridge_rows()]
    lines = [
        "Predicted against Megatron-Bridge's published BF16 rows, tokens/s per GPU, layouts as published",
        f"{'row':<38}{'published':>10}{'predicted':>10}{'error':>8}{'fits':>6}  layout",
    ]
    for one in compared:
        row, found = one.row, one.predicted
        fits = memory_refusal(found.memory, row.own or load_hardware("h100-ib")) is None
        lines.append(
            f"{row.name:<38}{_rate(row.measured):>10}{_rate(found.tokens_per_s / row.gpus):>10}{one.error:>+8.1%}"
            f"{'yes' if fits else 'no':>6}  {found.layout}"
        )
    return [*lines, f"mean error {mean_error(compared):.1%}, max {abs(worst_error(compared).error):.1%}"]
