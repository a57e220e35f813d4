"""Decoding at long contexts: how many sequences fit, and tokens/s per GPU at a time per token, of public models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from hp_plugin.planner.counts.feasibility import memory_refusal, shape_refusals
from hp_plugin.planner.counts.memory import memory_needed
from hp_plugin.planner.counts.share import Share
from hp_plugin.planner.inputs.layout import Layout
from hp_plugin.planner.inputs.model_shape import ModelShape
from hp_plugin.planner.inputs.models import load_model
from hp_plugin.planner.inputs.workload import Workload
from hp_plugin.planner.machine.hardware import Hardware, load_hardware
from hp_plugin.planner.search.candidates import Search, candidate_layouts, in_pieces
from hp_plugin.planner.search.plan import make_plan
from hp_plugin.planner.seconds.prediction import Prediction
from hp_plugin.planner.seconds.step import predict

GPUS = 64
"""Eight nodes of H100; most of a GB200 NVL72, of whose 72 no tensor-parallel size of these models takes more."""
MACHINES = ("h100-ib", "gb200-nvl72")
"""The machines that the models are predicted on."""
MODELS = ("llama3-70b", "llama3-405b", "qwen3-235b-a22b")
"""Public models that run at these contexts (Llama's 3.1 releases; Qwen3 at 128k with YaRN)."""
CONTEXTS = (32_768, 131_072)
"""Tokens of each sequence."""
BATCHES = (16, 32, 64, 128, 256)
"""Sequences at a time, of all GPUs together."""
TIMES = (10e-3, 20e-3, 40e-3, 80e-3)
"""Seconds that a token may take: the whole step, as servers count it, not the source's TPOT."""
SIDES = ("Megatron", "servers", "grid")
"""Stock layouts as Megatron-Core has them, stock layouts that share caches as servers do, exact grids."""
SEARCH = Search(("batch", "sequence"), served=True)
"""Layouts of all three."""
TRIED = 16
"""Quickest grids that are predicted again with their trades beside attention."""


def side(layout: Layout) -> str:
    """Which of `SIDES` a layout belongs to."""
    if layout.grid is not None:
        return SIDES[2]
    return SIDES[1] if layout.shared > 1 else SIDES[0]


@dataclass(frozen=True)
class Case:
    """One model on one machine at one context, predicted.

    Args:
        largest: the most sequences that fit, and the layout that holds them, by side.
        found: predictions of every layout and batch that fit.
        overlapping: the quickest grid if trades of partial outputs ran beside attention, as Helix's do and the plugin's
            do not; None where no grid that fits has any.
    """

    model: ModelShape
    machine: str
    context: int
    largest: dict[str, tuple[int, Layout]]
    found: list[Prediction]
    overlapping: Prediction | None = None

    def best(self, side_of: str, seconds: float) -> Prediction | None:
        """The most tokens/s of one side, every token within `seconds`; of equals the smaller batch."""
        fast = [one for one in self.found if side(one.layout) == side_of and one.step <= seconds]
        return max(fast, key=lambda one: (one.tokens_per_s, -one.workload.global_batch), default=None)

    def quickest(self, side_of: str) -> Prediction | None:
        """The shortest time per token of one side; of equals the larger batch."""
        mine = [one for one in self.found if side(one.layout) == side_of]
        return min(mine, key=lambda one: (one.step, -one.workload.global_batch), default=None)


def case(name: str, machine: str, context: int, gpus: int = GPUS, batches: Sequence[int] = BATCHES) -> Case:
    """Predicts every layout of a model at every batch."""
    model, hardware = load_model(name), load_hardware(machine)
    found: list[Prediction] = []
    for batch in batches:
        try:
            found += make_plan(model, gpus, Workload("decode", context, batch), hardware, SEARCH).found
        except ValueError:  # nothing holds so many
            break
    largest = _largest(model, gpus, context, hardware)
    return Case(model, machine, context, largest, found, _overlapping(found, hardware))


def _overlapping(found: Sequence[Prediction], hardware: Hardware) -> Prediction | None:
    grids = (one for one in found if side(one.layout) == SIDES[2] and one.share.rule.joined(one.share.attention_shape))
    quickest = sorted(grids, key=lambda one: one.step)[:TRIED]
    again = [predict(one.model, layout, one.workload, hardware) for one in quickest for layout in in_pieces(one.layout)]
    return min(again, key=lambda one: one.step, default=None)


def _largest(model: ModelShape, gpus: int, context: int, hardware: Hardware) -> dict[str, tuple[int, Layout]]:
    most: dict[str, tuple[int, Layout]] = {}
    # A batch that every number of replicas divides shows every layout.
    layouts = candidate_layouts(model, gpus, Workload("decode", context, gpus), SEARCH, hardware.domain)
    for layout in dict.fromkeys(replace(layout, micro_batch=1, kv_pieces=1) for layout in layouts):
        held = sequences_that_fit(model, layout, context, hardware)
        if held > most.get(side(layout), (0, layout))[0]:
            most[side(layout)] = held, layout
    return most


def sequences_that_fit(model: ModelShape, layout: Layout, context: int, hardware: Hardware) -> int:
    """The most sequences at a time that all replicas of a layout hold together; 0 where it cannot run."""

    def fits(per_replica: int) -> bool:
        mine = replace(layout, micro_batch=per_replica)
        share = Share.on(hardware, model, mine, Workload("decode", context, per_replica * layout.dp))
        return not shape_refusals(share) and memory_refusal(memory_needed(share), hardware) is None

    # Samples are spread evenly, or not at all.
    unit = 1 if fits(1) else layout.n
    low, high = 0, 1
    while fits(high * unit):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * unit) else (low, middle)
    return low * unit * layout.dp


def cases() -> Iterator[Case]:
    """All of them."""
    for machine in MACHINES:
        for name in MODELS:
            for context in CONTEXTS:
                yield case(name, machine, context)


def long_context_report() -> list[str]:
    """What fits and how fast it is, case by case."""
    sizes = ", ".join(map(str, BATCHES))
    lines = [
        f"Decoding at long contexts on {GPUS} GPUs, batches of {sizes} sequences on all of them.",
        "most: sequences that fit; least: the shortest time of a token; rows of ms: most tokens/s per GPU of which no",
        "token takes longer, with batch and layout. trade: of the shortest time, collectives between ranks that share",
        "a cache, exposed + hidden beside kernels. pieces: the grid's shortest time, and its trade, if partial outputs",
        "were traded beside attention in pieces of the batch, as Helix does and the plugin does not. Megatron: stock",
        "TP, PP, DP and EP; servers: stock with dcp (vLLM, SGLang), kvp (Helix, in pieces where that is faster) or adp",
        "(attention data parallelism); grid: exact grids, n > 1. Last columns: the grid over Megatron, and over the",
        "better of Megatron and servers (least: their times over the grid's).",
    ]
    for one in cases():
        lines += ["", *case_lines(one)]
    return lines


def case_lines(one: Case) -> list[str]:
    """One case as a table."""
    model = one.model
    cache = 2 * model.g * model.d * model.layers * one.context * 2
    quickest = [one.quickest(name) for name in SIDES]
    lines = [
        f"{model.name}, {one.machine}, context {one.context:,}: a sequence's keys and values are {cache / 1e9:.1f} GB",
        _line("ms", SIDES, "/Megatron", "/both"),
        _line("most", [_most(one, name) for name in SIDES], *_ratios(_held(one))),
        _line(
            "least",
            [_slowest(each) for each in quickest],
            *_ratios([1 / each.step if each else 0 for each in quickest]),
        ),
        _line("trade", [_traded(each) for each in quickest]),
        _line("pieces", ["", "", f"{_slowest(one.overlapping)}: {_traded(one.overlapping)}"]),
    ]
    for seconds in TIMES:
        best = [one.best(name, seconds) for name in SIDES]
        rates = _ratios([found.tokens_per_s if found else 0.0 for found in best])
        lines.append(_line(f"{seconds * 1e3:.0f}", [_fastest(found) for found in best], *rates))
    return lines


def _line(head: str, cells: Sequence[str], *ratios: str) -> str:
    said = f"{head:>6}" + "".join(f"  {cell:<46}" for cell in cells) + "".join(f"{each:>10}" for each in ratios)
    return said.rstrip()


def _held(one: Case) -> list[float]:
    return [one.largest[name][0] if name in one.largest else 0 for name in SIDES]


def _most(one: Case, name: str) -> str:
    if name not in one.largest:
        return "does not fit"
    held, layout = one.largest[name]
    return f"{held:,} {_short(layout)}"


def _slowest(found: Prediction | None) -> str:
    return "-" if found is None else f"{found.step * 1e3:.1f} ms {_batch(found)}"


def _traded(found: Prediction | None) -> str:
    if found is None or found.layout.n == 1:
        return "-"
    exposed, hidden = (1e3 * each.get("dim", 0.0) for each in (found.waiting, found.hidden))
    return f"{exposed:.2f} + {hidden:.2f} ms"


def _fastest(found: Prediction | None) -> str:
    return "-" if found is None else f"{found.tokens_per_s / found.layout.world:,.1f} {_batch(found)}"


def _batch(found: Prediction) -> str:
    return f"({found.workload.global_batch}: {_short(found.layout)})"


def _short(layout: Layout) -> str:
    """A layout without what the batch says; experts are Megatron's unless it says otherwise."""
    said = str(replace(layout, micro_batch=1)).replace(",mbs=1", "").replace(",moe=megatron", "")
    return said.replace("exchange=", "")


def _ratios(values: Sequence[float]) -> tuple[str, str]:
    """The grid's over Megatron's, and over the larger of Megatron's and the servers'."""
    megatron, servers, grid = values
    beside, best = (f"{grid / other:.2f}" if other and grid else "-" for other in (megatron, max(megatron, servers)))
    return beside, best
