"""Plans, single predictions and machines as text."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence

from hp_plugin.planner.counts.gradients import chunk_sync, end_of_step
from hp_plugin.planner.counts.layer import layer_passes
from hp_plugin.planner.counts.program import Collective, collectives
from hp_plugin.planner.machine.hardware import Hardware
from hp_plugin.planner.machine.parameter import KINDS, PARAMETERS
from hp_plugin.planner.search.launch_flags import deepspeed_config, megatron_flags, not_in_flags
from hp_plugin.planner.search.plan import Plan
from hp_plugin.planner.seconds.prediction import Prediction
from hp_plugin.planner.seconds.pricing import Pricer, group_placements

MARK = "≠"
"""Marks layouts that compute another function than the model's attention (`local`)."""


MEMORY_PARTS = ("weights", "gradients", "optimizer", "activations", "buffers", "cache")
"""Uses of device memory, as `Memory` names them."""

TIE = 1.10
"""Ratios below this are within the planner's error (docs/planner.md, "Against published runs")."""


def plan_report(plan: Plan, top: int, dtype: str) -> list[str]:
    """The fastest layouts, the best of each kind, flags for the best stock and the best grid layout, refusals."""
    shown = plan.found[:top]
    lines = [
        f"{len(plan.found)} layouts can run, {len(plan.refused)} cannot; the fastest {len(shown)}:",
        *layout_table(shown),
    ]
    tied = [found for found in plan.found if TIE * found.tokens_per_s > plan.found[0].tokens_per_s]
    if len(tied) > 1:
        lines.append(f"the first {len(tied)} are less than {TIE - 1:.0%} apart: a tie, as far as predictions go")
    kinds = plan.best_of_each_kind()
    others = [found for found in kinds if found not in shown][:top]
    if others:
        lines += ["", f"the fastest of other kinds ({len(kinds)} kinds in all):", *layout_table(others)]
    if any(MARK in line for line in lines):
        lines.append(f"{MARK} exchange `local` is another function than the model's attention (see docs/planner.md)")
    for label, found in _launches(plan):
        training = found.workload.training
        what = "to run the fastest" if training else "model and layout flags of the fastest"
        lines += ["", f"{what} {label} layout, {found.layout}:", *wrapped(megatron_flags(found, dtype))]
        missing = not_in_flags(found.model)
        if missing:
            lines.append(f"no flag of pretrain_gpt.py builds, of {found.model.name}: {'; '.join(missing)}")
        if training:
            lines += _deepspeed_line(found, dtype)
    return [*lines, *_refusals(plan)]


def _deepspeed_line(found: Prediction, dtype: str) -> list[str]:
    """The layout as a DeepSpeed configuration, where it can be one."""
    try:
        return [f"DeepSpeed: {json.dumps(deepspeed_config(found, dtype))}"]
    except ValueError:
        return []


def _launches(plan: Plan) -> list[tuple[str, Prediction]]:
    stock = [("stock-attention", found) for found in plan.exact if found.layout.grid is None][:1]
    return stock + [("grid", found) for found in plan.exact if found.layout.grid is not None][:1]


def layout_table(found: Sequence[Prediction]) -> list[str]:
    width = max(len(str(one.layout)) for one in found) + 4
    lines = [
        f"  {'layout':<{width}}{'tokens/s':>12}{'TPOT ms':>9}{'bubble':>8}{'memory GB':>11}{'TFLOP/s':>9}  bottleneck"
    ]
    for one in found:
        mark = "" if one.layout.exact else f" {MARK}"
        lines.append(
            f"  {f'{one.layout}{mark}':<{width}}{one.tokens_per_s:>12,.0f}{one.tpot * 1e3:>9.3f}{one.bubble:>8.1%}"
            f"{one.memory.total / 1e9:>11.1f}{one.operations_per_s / 1e12:>9.0f}  {one.bottleneck}"
        )
    return lines


def wrapped(words: Sequence[str], width: int = 116) -> list[str]:
    lines = ["  "]
    for word in words:
        if len(lines[-1]) + len(word) + 1 > width:
            lines[-1] += " \\"
            lines.append("  ")
        lines[-1] += f"{'' if lines[-1].isspace() else ' '}{word}"
    return lines


def _refusals(plan: Plan) -> list[str]:
    if not plan.refused:
        return []
    grouped: dict[tuple[str, ...], list[str]] = {}
    for one in plan.refused:
        # One line per rule: the numbers differ, the rule does not.
        grouped.setdefault(one.kinds, []).append(f"{one.layout} {one.text}")
    lines = ["", "layouts that cannot run (--list-refused for all), by reason:"]
    for examples in sorted(grouped.values(), key=len, reverse=True):
        lines.append(f"  {len(examples):>5}  for example {examples[0]}")
    return lines


def refused_report(plan: Plan) -> list[str]:
    """Every layout that cannot run, with its reason."""
    return [f"{one.layout}: {one.text}" for one in plan.refused]


def explanation(found: Prediction, hardware: Hardware) -> list[str]:
    """Where one predicted step's time and memory go, and every collective of a layer."""
    step = found.step
    layout = found.layout
    lines = [
        f"{found.model.name}, {found.workload.mode}, {layout} on {layout.world} × {hardware.name}",
        f"step {step * 1e3:.3f} ms, {found.tokens_per_s:,.0f} tokens/s, TPOT {found.tpot * 1e3:.4f} ms, "
        f"{found.micro_batches} micro-batches of {layout.micro_batch}, "
        f"{found.operations_per_s / 1e12:.0f} TFLOP/s per GPU",
        "",
        "time of a mean rank in one step:",
        f"  {'kernels':<34}{found.compute * 1e3:>12.3f} ms{found.compute / step:>8.1%}",
    ]
    for axis, seconds in sorted(found.waiting.items(), key=lambda item: -item[1]):
        label = "waiting for other stages" if axis == "pipeline" else f"waiting for {axis} collectives"
        lines.append(f"  {label:<34}{seconds * 1e3:>12.3f} ms{seconds / step:>8.1%}")
    for axis, seconds in sorted(found.hidden.items(), key=lambda item: -item[1]):
        if seconds:
            lines.append(f"  {f'({axis} collectives beside kernels)':<34}{seconds * 1e3:>12.3f} ms")
    lines += ["", "kernels (blocks by their first kernel):"]
    ranked = sorted(found.kernels.items(), key=lambda item: -item[1])
    shown, rest = ranked[:14], sum(seconds for _, seconds in ranked[14:])
    shown += [(f"{len(ranked) - 14} others", rest)] if rest else []
    lines += [f"  {name:<34}{seconds * 1e3:>12.3f} ms{seconds / step:>8.1%}" for name, seconds in shown]
    needed = found.memory
    lines += ["", "memory of the fullest rank:"]
    for name in MEMORY_PARTS:
        lines.append(f"  {name:<34}{getattr(needed, name) / 1e9:>12.3f} GB")
    lines.append(f"  {'total':<34}{needed.total / 1e9:>12.3f} GB")
    return [*lines, "", *_collectives(found, hardware), "", *_once(found, hardware)]


def _collectives(found: Prediction, hardware: Hardware) -> list[str]:
    passes = layer_passes(found.share, bool(found.model.experts))
    lines = ["collectives of one layer and micro-batch (time alone, without overlap):"]
    for label, program in (("forward", passes.forward), ("backward", passes.backward)):
        if label == "backward" and not found.workload.training:
            continue
        lines += _listed(found, hardware, label, collectives(program))
    return lines if len(lines) > 1 else [*lines, "  none"]


def _once(found: Prediction, hardware: Hardware) -> list[str]:
    """What the first pipeline rank exchanges once per step, beside the passes or after them."""
    share, pp = found.share, found.layout.pp
    each: list[Collective] = []
    for chunk, parameters in enumerate(share.parameters[::pp]):
        sync = chunk_sync(share, parameters, 0, chunk)
        each += [*sync.gradients, *sync.weights]
    each += end_of_step(share, share.stages[::pp])
    lines = ["collectives of one step on the first pipeline rank, gradients and weights beside the passes:"]
    lines += _listed(found, hardware, "", each)
    return lines if len(lines) > 1 else [*lines, "  none"]


def _listed(found: Prediction, hardware: Hardware, label: str, program: Iterable[Collective]) -> list[str]:
    """Collectives that move anything, with how often each occurs, its group, size and time."""
    layout = found.layout
    groups = group_placements(layout, hardware)
    pricer = Pricer(hardware, groups, found.workload.itemsize, layout.fused)
    lines = []
    for each, count in Counter(program).items():
        group = groups[each.axis]
        if group.size > 1:
            name = each.name if count == 1 else f"{count} × {each.name}"
            lines.append(
                f"  {label:<9}{name:<34}{each.kind:<15}{each.axis:<6}{group.size:>4} ranks in {group.domains} "
                f"domain(s){each.bytes / 1e6:>12.3f} MB{pricer.collective(each) * 1e3:>10.4f} ms"
            )
    return lines


def hardware_report(hardware: Hardware) -> list[str]:
    """Every parameter of a machine with its kind and source, then the tables behind it."""
    lines = [f"{hardware.name}: {hardware.description}", ""]
    for name, meaning in PARAMETERS.items():
        parameter = hardware.parameters[name]
        lines.append(f"{name} = {parameter.value:g}  [{parameter.kind}] {meaning}")
        lines.append(f"    {parameter.source}")
    lines += ["", "tables:", *(f"  {source}" for source in hardware.sources), "", "kinds:"]
    return [*lines, *(f"  {kind}: {meaning}" for kind, meaning in KINDS.items())]
