"""What to change in a launch: a verdict in words, the layouts beside each other, the flags, and where memory goes."""

from __future__ import annotations

from hp_plugin.planner.counts.feasibility import memory_refusal
from hp_plugin.planner.inputs.megatron_launch import Launch
from hp_plugin.planner.machine.hardware import Hardware
from hp_plugin.planner.reports.text import MEMORY_PARTS, TIE, layout_table, wrapped
from hp_plugin.planner.search.launch_flags import DATA_PARALLEL_FLAGS, megatron_flags
from hp_plugin.planner.search.plan import Plan
from hp_plugin.planner.search.relief import reliefs
from hp_plugin.planner.seconds.prediction import Prediction


def launch_advice(
    launch: Launch,
    mine: Prediction,
    plan: Plan | None,
    hardware: Hardware,
    capacity: float | None = None,
    nothing: str = "",
) -> list[str]:
    """The report: `mine` is the launch as it is, `plan` what else runs on its GPUs (None: nothing, and why)."""
    refusal = memory_refusal(mine.memory, hardware, capacity)
    best = plan.exact[0] if plan is not None and plan.exact else None
    lines = [_verdict(mine, best, None if refusal is None else refusal.text, nothing)]
    lines += [f"note: {note}" for note in launch.notes]
    shown = [mine, *_others(mine, plan)]
    lines += ["", f"yours, then the fastest with stock attention and on a grid, on {launch.gpus} × {hardware.name}:"]
    lines += layout_table(shown)
    if best is not None and (refusal is not None or best.tokens_per_s >= TIE * mine.tokens_per_s):
        lines += ["", f"to change for {best.layout}:", *_difference(mine, best, launch.dtype)]
    lines += ["", *_memory_lines(mine, hardware)]
    return lines


def _verdict(mine: Prediction, best: Prediction | None, too_much: str | None, nothing: str) -> str:
    if too_much is not None:
        if best is None:
            return f"does not fit: {too_much}; {nothing}"
        return f"does not fit: {too_much}; the fastest layout that does is {best.layout}"
    if best is None or best.tokens_per_s <= mine.tokens_per_s:
        return "fits; nothing that was tried is faster than your layout"
    ratio = best.tokens_per_s / mine.tokens_per_s
    if ratio < TIE:
        return f"fits; a tie: the fastest found ({best.layout}) is {ratio:.2f} times yours, within the planner's error"
    return f"fits; {best.layout} is {ratio:.2f} times your current layout: {_headline(best)}"


def _headline(best: Prediction) -> str:
    layout = best.layout
    if layout.grid is not None:
        return f"--head-dim-parallel {layout.m},{layout.n}"
    flags = f"--tensor-model-parallel-size {layout.tp} --pipeline-model-parallel-size {layout.pp}"
    return f"{flags} {DATA_PARALLEL_FLAGS[layout.zero][0]}" if layout.zero == "full" else flags


def _others(mine: Prediction, plan: Plan | None) -> list[Prediction]:
    if plan is None:
        return []
    stock = [found for found in plan.exact if found.layout.grid is None][:1]
    grid = [found for found in plan.exact if found.layout.grid is not None][:1]
    both = sorted(stock + grid, key=lambda found: -found.tokens_per_s)
    return [found for found in both if found.layout != mine.layout]


def _difference(mine: Prediction, best: Prediction, dtype: str) -> list[str]:
    """Flags to take out and to put in; those of the model are the same on both sides."""
    before, after = megatron_flags(mine, dtype), megatron_flags(best, dtype)
    out = [flag for flag in before if flag not in after]
    new = [flag for flag in after if flag not in before]
    lines = []
    if out:
        lines += ["  take out:", *wrapped(out)]
    if new:
        lines += ["  put in:", *wrapped(new)]
    if best.layout.grid is not None and mine.layout.grid is None:
        lines.append("  and start it with `-m hp_plugin.launch pretrain_gpt.py` in place of `pretrain_gpt.py`")
    return lines


def _memory_lines(found: Prediction, hardware: Hardware) -> list[str]:
    """Memory of the fullest rank by part, and the changes of one flag that free most of it."""
    needed = found.memory
    parts = {name: getattr(needed, name) for name in MEMORY_PARTS}
    beside = f"{hardware['reserved_bytes'] / 1e9:.0f} GB beside it for CUDA, NCCL and fragments"
    return [
        "memory of the fullest rank, to be held against its torch.cuda.max_memory_allocated():",
        *(f"  {name:<14}{value / 1e9:>9.1f} GB" for name, value in parts.items() if value),
        f"  {'total':<14}{needed.total / 1e9:>9.1f} GB; {beside}",
        *relief_lines(found, hardware),
    ]


def relief_lines(found: Prediction, hardware: Hardware) -> list[str]:
    """The changes of one flag that free most memory of a layout, with what each does to its speed."""
    helping = reliefs(found, hardware)
    lines = ["the changes of one flag that free most of it:"] if helping else []
    for each in helping:
        freed = (found.memory.total - each.memory.total) / 1e9
        lines.append(f"  {freed:>6.1f} GB  {each.flags}  ({each.speed:.2f} times the speed)")
    return lines
