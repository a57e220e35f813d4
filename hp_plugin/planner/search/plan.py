"""Which layout to use: every candidate predicted, the ones that cannot run with their reasons."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from hp_plugin.grid.ranks import DIM_INNERMOST
from hp_plugin.planner.counts.feasibility import MAX_GPUS, MEMORY, memory_refusal, shape_refusals
from hp_plugin.planner.counts.memory import MemoryNeeds
from hp_plugin.planner.counts.share import Share
from hp_plugin.planner.inputs.layout import Layout
from hp_plugin.planner.inputs.model_shape import ModelShape
from hp_plugin.planner.inputs.workload import Workload
from hp_plugin.planner.machine.hardware import Hardware
from hp_plugin.planner.search.candidates import Search, candidate_layouts
from hp_plugin.planner.seconds.prediction import Prediction
from hp_plugin.planner.seconds.step import predict_share
from hp_plugin.refusal import Refusal, RefusedError, shown


@dataclass(frozen=True)
class RefusedLayout:
    """A layout that cannot run, and why."""

    layout: Layout
    refusals: tuple[Refusal, ...]

    @property
    def kinds(self) -> tuple[str, ...]:
        """Which rules say so."""
        return tuple(refusal.kind for refusal in self.refusals)

    @property
    def text(self) -> str:
        """All reasons, for people."""
        return "; ".join(refusal.text for refusal in self.refusals)


@dataclass
class Plan:
    """What a search found: predictions, fastest first, and why the other layouts cannot run."""

    found: list[Prediction] = field(default_factory=list)
    refused: list[RefusedLayout] = field(default_factory=list)

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
        raise ValueError(f"--gpus must be between 1 and {MAX_GPUS}, got {shown(gpus)}")
    plan = Plan()
    search = search or Search()
    for number, layout in enumerate(candidate_layouts(model, gpus, workload, search, hardware.domain), start=1):
        if watch is not None:
            watch(number)
        try:
            plan.found.append(fitting(model, layout, workload, hardware, capacity))
        except RefusedError as error:
            plan.refused.append(RefusedLayout(layout, error.refusals))
    if not plan.found:
        raise ValueError(_nothing_fits(model, gpus, workload, search, plan.refused))
    # Of equals, the model's own function and what needs no plugin come first.
    plan.found.sort(
        key=lambda found: (
            -round(found.tokens_per_s, 3),
            not found.layout.exact,
            found.layout.grid is not None,
            found.layout.order != DIM_INNERMOST,
            str(found.layout),
        )
    )
    return plan


def fitting(
    model: ModelShape, layout: Layout, workload: Workload, hardware: Hardware, capacity: float | None = None
) -> Prediction:
    """The prediction of a layout with the least recomputation that fits into memory.

    Raises:
        RefusedError: the layout cannot run the model, or does not fit however much is recomputed.
    """
    share = Share.on(hardware, model, layout, workload)
    refusals = shape_refusals(share)
    if refusals:
        raise RefusedError(refusals)
    needs = MemoryNeeds(share)
    for recompute in _recomputations(share):
        needed = needs.recomputing(recompute)
        refusal = memory_refusal(needed, hardware, capacity)
        if refusal is None:
            return predict_share(share.recomputing(recompute), hardware, needed)
    assert refusal is not None, "there is at least one choice"
    if workload.training:
        refusal = replace(refusal, text=f"{refusal.text}, even with everything recomputed")
    raise RefusedError([refusal])


def _recomputations(share: Share) -> Iterable[str]:
    if not share.workload.training or share.layout.recompute != "none":
        return (share.layout.recompute,)
    # Computing core attention again saves its scores, if it keeps any.
    return ("none", "selective", "full") if share.keeps_scores else ("none", "full")


def _nothing_fits(
    model: ModelShape, gpus: int, workload: Workload, search: Search, refused: list[RefusedLayout]
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
    # Those that memory alone rules out: the one that lacks least says how much is missing.
    short = [refusal for one in refused for refusal in one.refusals if refusal.kind == MEMORY]
    if short:
        least = min(short, key=lambda refusal: refusal.amount)
        return (
            f"no layout of {model.name} ({model.parameters / 1e9:.1f} B parameters) fits on {gpus} GPUs: the smallest "
            f"{least.text}; use more GPUs, a smaller model or --memory-gb"
        )
    reasons = sorted({one.text for one in refused}, key=len)
    way_out = f"; or {batch}" if workload.global_batch % gpus else ""
    return f"no layout of {model.name} runs on {gpus} GPUs: {reasons[0]}{way_out}"
