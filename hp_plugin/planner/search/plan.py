"""Which layout to use: every candidate predicted, the ones that cannot run with their reasons."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from hp_plugin.planner.counts.core_attention import is_fused
from hp_plugin.planner.counts.feasibility import memory_problem, shape_problems
from hp_plugin.planner.counts.memory import memory
from hp_plugin.planner.counts.share import Share
from hp_plugin.planner.inputs.layout import Layout
from hp_plugin.planner.inputs.model_shape import ModelShape
from hp_plugin.planner.inputs.workload import Workload
from hp_plugin.planner.machine.hardware import Hardware
from hp_plugin.planner.search.candidates import Search, candidates
from hp_plugin.planner.seconds.prediction import Prediction
from hp_plugin.planner.seconds.step import predict

MAX_GPUS = 65_536
"""GPUs beyond which a number is taken for a typing error."""


@dataclass
class Plan:
    """What a search found: predictions, fastest first, and why the other layouts cannot run."""

    found: list[Prediction] = field(default_factory=list)
    refused: list[tuple[Layout, str]] = field(default_factory=list)

    def best_of_each_kind(self) -> list[Prediction]:
        """The fastest prediction of each kind of layout (stock or grid, its sizes and exchange), fastest first."""
        best: dict[str, Prediction] = {}
        for prediction in self.found:
            best.setdefault(prediction.layout.kind, prediction)
        return list(best.values())

    @property
    def exact(self) -> list[Prediction]:
        """Predictions that compute the model's own attention (`local` does not)."""
        return [found for found in self.found if found.layout.exact]


def make_plan(
    model: ModelShape,
    gpus: int,
    workload: Workload,
    hardware: Hardware,
    search: Search | None = None,
    capacity: float | None = None,
    watch: Callable[[int], None] | None = None,
) -> Plan:
    """Predicts every candidate; recomputation is added only where memory does not suffice without.

    Args:
        capacity: device memory in bytes, if not the hardware's.
        watch: is told after every layout how many have been looked at.

    Raises:
        ValueError: no layout fits; the message says what each kind of refusal lacks.
    """
    if not 1 <= gpus <= MAX_GPUS:
        raise ValueError(f"--gpus must be between 1 and {MAX_GPUS}, got {gpus}")
    plan = Plan()
    search = search or Search()
    for number, layout in enumerate(candidates(model, gpus, workload, search), start=1):
        if watch is not None:
            watch(number)
        try:
            found = fitting(model, layout, workload, hardware, capacity)
        except ValueError as error:
            plan.refused.append((layout, str(error).removeprefix(f"{layout}: ")))
            continue
        plan.found.append(found)
    if not plan.found:
        raise ValueError(_nothing_fits(model, gpus, workload, search, plan.refused))
    # Of equals, the model's own function and what needs no plugin come first.
    plan.found.sort(
        key=lambda found: (
            -round(found.tokens_per_s, 3),
            not found.layout.exact,
            found.layout.grid is not None,
            str(found.layout),
        )
    )
    return plan


def fitting(
    model: ModelShape, layout: Layout, workload: Workload, hardware: Hardware, capacity: float | None = None
) -> Prediction:
    """The prediction of a layout with the least recomputation that fits into memory.

    Raises:
        ValueError: the layout cannot run the model, or does not fit however much is recomputed.
    """
    said = ""
    for recompute in _recomputations(model, layout, workload):
        share = Share(model, replace(layout, recompute=recompute), workload)
        problems = shape_problems(share)
        if problems:
            raise ValueError("; ".join(problems))
        needed = memory(share, workload.global_batch // (layout.dp * layout.micro_batch))
        said = memory_problem(needed, hardware, capacity) or ""
        if not said:
            return predict(model, share.layout, workload, hardware)
    raise ValueError(said + (", even with everything recomputed" if workload.training else ""))


def _recomputations(model: ModelShape, layout: Layout, workload: Workload) -> Iterable[str]:
    if not workload.training or layout.recompute != "none":
        return (layout.recompute,)
    width = model.d // (layout.n if layout.grid and layout.grid.exchange == "local" else 1)
    return ("none", "full") if is_fused(width, True) else ("none", "selective", "full")


def _nothing_fits(
    model: ModelShape, gpus: int, workload: Workload, search: Search, refused: list[tuple[Layout, str]]
) -> str:
    batch = (
        f"global batch {workload.global_batch} must be a multiple of the data-parallel size (try --global-batch "
        f"{max(1, workload.global_batch // gpus) * gpus})"
    )
    if search.tensor_parallel is not None and not any(gpus % tp == 0 for tp in search.tensor_parallel):
        return f"--tp {' '.join(map(str, search.tensor_parallel))}: no such size divides {gpus} GPUs"
    if not refused:
        if search.micro_batches is not None:
            return (
                f"no layout of {model.name} on {gpus} GPUs has --micro-batches {search.micro_batches}: it must divide "
                f"what global batch {workload.global_batch} leaves every replica, into at most "
                f"{search.max_micro_batch} sequences each (--max-micro-batch)"
            )
        return f"no layout of {model.name} divides over {gpus} GPUs: {batch}"
    memory = [said for _, said in refused if said.startswith("needs ")]
    if memory:
        least = min(memory, key=lambda said: float(said.split()[1]))
        return (
            f"no layout of {model.name} ({model.parameters / 1e9:.1f} B parameters) fits on {gpus} GPUs: the smallest "
            f"{least}; use more GPUs, a smaller model or --memory-gb"
        )
    reasons = sorted({said for _, said in refused}, key=len)
    way_out = f"; or {batch}" if workload.global_batch % gpus else ""
    return f"no layout of {model.name} runs on {gpus} GPUs: {reasons[0]}{way_out}"
