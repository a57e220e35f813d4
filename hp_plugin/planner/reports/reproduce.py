"""The source experiments' four rows beside predictions, over everything their table leaves open."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from hp_plugin.grid.ranks import ORDERS
from hp_plugin.planner.counts.feasibility import memory_refusal
from hp_plugin.planner.inputs.layout import Layout
from hp_plugin.planner.inputs.model_shape import ModelShape
from hp_plugin.planner.inputs.models import load_model
from hp_plugin.planner.inputs.workload import Workload
from hp_plugin.planner.machine.hardware import Hardware, load_hardware
from hp_plugin.planner.machine.json_file import package_json
from hp_plugin.planner.search.candidates import Search
from hp_plugin.planner.search.plan import make_plan
from hp_plugin.planner.seconds.prediction import Prediction
from hp_plugin.planner.seconds.step import predict

GPUS = 16
GLOBAL_BATCH = 1024
MACHINES = ("h100-ib", "h100-nvlink")
SEQUENCES = {"forward": (512, 2048, 8192), "train": (512, 2048, 8192), "decode": (128, 512, 2048)}
"""Sequence lengths tried; context lengths in decode."""
MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
"""Micro-batches per step tried, the same on both sides."""
BASELINE = "tp=8,pp=2"
GRIDS = ("8x2", "4x4", "2x8", "1x16")
"""Grids of 16 ranks with a dim axis; 16x1 is stock TP=16."""


@dataclass(frozen=True)
class Setting:
    """One choice of what the table leaves open."""

    model: str
    machine: str
    mode: str
    seq: int
    micro_batches: int


@dataclass(frozen=True)
class Pair:
    """Baseline and grids in one setting; `fits` tells whether baseline and best grid fit into 80 GB, `weights_fit` the
    same of the baseline and the best grid whose weights move (None in decode)."""

    setting: Setting
    baseline: Prediction
    grid: Prediction
    local: Prediction
    stock_tp: Prediction
    fits: bool
    weights: Prediction | None = None
    weights_fit: bool = False

    @property
    def ratio(self) -> float:
        """Tokens/s of the best exact grid over the baseline's."""
        return self.grid.tokens_per_s / self.baseline.tokens_per_s

    @property
    def weights_ratio(self) -> float:
        """The same for the best grid whose weights move; 0 where there is none."""
        return self.weights.tokens_per_s / self.baseline.tokens_per_s if self.weights else 0.0

    @property
    def local_ratio(self) -> float:
        """The same for the literal method (another function)."""
        return self.local.tokens_per_s / self.baseline.tokens_per_s


def settings(model: str) -> Iterator[Setting]:
    """Everything tried for one model."""
    for mode, lengths in SEQUENCES.items():
        for seq in lengths:
            for count in MICRO_BATCHES:
                for machine in MACHINES:
                    yield Setting(model, machine, mode, seq, count)


def pair(setting: Setting) -> Pair:
    """Predicts one setting.

    Batch 1024 is taken as sequences, experts as DeepSpeed-MoE over 8 ranks on both sides; every layout has sequence
    parallelism where that makes it faster.
    """
    model = load_model(setting.model)
    hardware = load_hardware(setting.machine)
    workload = Workload(setting.mode, setting.seq, GLOBAL_BATCH, grad_itemsize=2)

    def run(text: str) -> Prediction:
        experts = ",ep=8,moe=deepspeed" if model.experts else ""
        full = f"{text},mbs={GLOBAL_BATCH // setting.micro_batches}{experts}"
        variants = (full,) if setting.mode == "decode" else (full, f"{full},sp")
        found = [predict(model, Layout.parse(variant, GPUS), workload, hardware) for variant in variants]
        return max(found, key=lambda one: one.tokens_per_s)

    baseline = run(BASELINE)
    grid = max((run(f"grid={shape},exchange=batch") for shape in GRIDS), key=lambda found: found.tokens_per_s)
    fits = all(memory_refusal(found.memory, hardware) is None for found in (baseline, grid))
    local = max((run(f"grid={shape},exchange=local") for shape in GRIDS), key=lambda found: found.tokens_per_s)
    pair = Pair(setting, baseline, grid, local, run("tp=16"), fits)
    if setting.mode == "decode":
        return pair
    moved = [run(f"grid={shape},exchange=weights,order={order}") for shape in GRIDS for order in ORDERS]
    best = max(moved, key=lambda found: found.tokens_per_s)
    fit = all(memory_refusal(found.memory, hardware) is None for found in (baseline, best))
    return replace(pair, weights=best, weights_fit=fit)


def reported(model: str) -> tuple[list[float], list[float]]:
    """(TPS, TPOT in ms) of baseline and grid, as reported for a model."""
    rows = package_json("reports/data/published.json")["source_experiments"]["rows"]
    mine = [row for row in rows if row[0] == model.removeprefix("paper-")]
    return [row[2] for row in mine], [row[3] for row in mine]


def reproduction_report() -> list[str]:
    """The whole comparison as lines of text."""
    lines = [
        "The source experiments' rows (16 H100, batch 1024) beside predictions",
        "Nothing is fitted to these rows. Not stated there and varied here: interconnect, mode, sequence (in decode:",
        "context) length, micro-batches. Taken: batch = sequences, the same micro-batches on both sides, sequence",
        "parallelism where it is faster, no vocabulary, no data parallelism, top-1 experts through DeepSpeed-MoE over",
        "8 ranks. Grids trade activations (exchange `batch`); weights: ratio of the best whose weights move, in either",
        "order of its ranks. `!`: does not fit into 80 GB without recomputation.",
    ]
    for name in ("paper-dense", "paper-moe"):
        pairs = [pair(setting) for setting in settings(name)]
        lines += ["", *_model_report(name, pairs)]
    return lines


def _model_report(name: str, pairs: list[Pair]) -> list[str]:
    (base_tps, grid_tps), (base_ms, grid_ms) = reported(name)
    lines = [
        f"== {name}: reported {base_tps / 1e6:.2f} M tokens/s, TPOT {base_ms:.2f} ms ({BASELINE}) against "
        f"{grid_tps / 1e6:.2f} M, {grid_ms:.2f} ms (grid): ratio {grid_tps / base_tps:.3f}"
    ]
    for mode in SEQUENCES:
        lines += ["", *_table(mode, [one for one in pairs if one.setting.mode == mode])]
    lines += ["", *_findings(grid_tps / base_tps, base_tps, pairs), *_with_weights(grid_tps / base_tps, pairs)]
    return [*lines, *_really_best(load_model(name))]


def _table(mode: str, pairs: list[Pair]) -> list[str]:
    length = "context" if mode == "decode" else "sequence"
    head = f"{'TPS M':>8}{'TPOT':>7}{'grid':>9}{'TPS M':>7}{'TPOT':>7}{'ratio':>7}  weights{'local':>7}{'TP=16':>7}  "
    lines = [f"{mode}: {length}, micro-batches; then {BASELINE}, best exact grid, ratios to {BASELINE}"]
    lines.append(f"{'':>15}{MACHINES[0]:^68}  {MACHINES[1]:^68}".rstrip())
    lines.append(f"{'':>9}{'mb':>5} " + (head + " ") * 2)
    by_row: dict[tuple[int, int], list[Pair]] = {}
    for one in pairs:
        by_row.setdefault((one.setting.seq, one.setting.micro_batches), []).append(one)
    for (seq, count), both in by_row.items():
        cells = "  ".join(_cell(one) for one in both)
        lines.append(f"{seq:>9}{count:>5} {cells}".rstrip())
    return lines


def _cell(one: Pair) -> str:
    grid = one.grid.layout
    return (
        f"{one.baseline.tokens_per_s / 1e6:>8.3f}{one.baseline.tpot * 1e3:>7.2f}{f'{grid.m}x{grid.n}':>9}"
        f"{one.grid.tokens_per_s / 1e6:>7.3f}{one.grid.tpot * 1e3:>7.2f}{one.ratio:>7.2f}{_weights(one):>9}"
        f"{one.local_ratio:>7.2f}"
        f"{one.stock_tp.tokens_per_s / one.baseline.tokens_per_s:>7.2f}{' ' if one.fits else '!'} "
    )


def _weights(one: Pair) -> str:
    return f"{one.weights_ratio:.2f}{' ' if one.weights_fit else '!'}" if one.weights else "- "


def _with_weights(ratio: float, pairs: list[Pair]) -> list[str]:
    """The same of grids whose weights move."""
    moved = [one for one in pairs if one.weights]
    near = [one for one in moved if abs(one.weights_ratio / ratio - 1) <= 0.05]
    lines = [
        f"weights moved: within 5 % of the reported ratio in {len(near)} of {len(moved)} settings, "
        f"{len([one for one in near if one.weights_fit])} of them fit into memory"
    ]
    for mode in SEQUENCES:
        many = [one for one in moved if one.setting.mode == mode and one.setting.micro_batches >= 8]
        fitting = [one for one in many if one.weights_fit]
        if fitting:
            best = max(fitting, key=lambda one: one.weights_ratio)
            assert best.weights is not None
            lines.append(
                f"  {mode}, 8 micro-batches and more, {len(fitting)} of {len(many)} that fit: "
                f"{min(one.weights_ratio for one in fitting):.2f} to {best.weights_ratio:.2f} "
                f"({best.weights.layout.m}x{best.weights.layout.n}, {best.setting.machine}, {best.setting.seq} tokens, "
                f"{best.setting.micro_batches} micro-batches); {BASELINE} waits {best.baseline.bubble:.0%} of its step "
                f"for the pipeline and {_share(best.baseline):.0%} for collectives, that grid "
                f"{_share(best.weights):.0%} for collectives"
            )
    return lines


def _findings(ratio: float, tps: float, pairs: list[Pair]) -> list[str]:
    """Where the reported ratio comes out, and what makes it."""
    fitting = [one for one in pairs if one.fits]
    near = sorted(
        (one for one in pairs if abs(one.ratio / ratio - 1) <= 0.05),
        key=lambda one: (not one.fits, abs(one.ratio - ratio)),
    )
    fastest = max(fitting, key=lambda one: one.baseline.tokens_per_s)
    best = max(fitting, key=lambda one: one.grid.tokens_per_s)
    lines = [
        f"reported ratio {ratio:.3f} within 5 %: {len(near)} of {len(pairs)} settings, "
        f"{len([one for one in near if one.fits])} of them fit into memory"
    ]
    lines += [f"  {_described(one)}" for one in near[:6]]
    winning = [one for one in fitting if one.ratio > 1]
    lines.append(f"the grid wins in {len(winning)} of {len(fitting)} settings that fit:")
    for mode in SEQUENCES:
        counts = sorted({one.setting.micro_batches for one in winning if one.setting.mode == mode})
        total = len([one for one in fitting if one.setting.mode == mode])
        said = f"with {', '.join(map(str, counts))} micro-batches" if counts else "nowhere"
        wins = len([one for one in winning if one.setting.mode == mode])
        lines.append(f"  {mode}: {wins} of {total}, {said}")
    lines.append(
        f"highest predicted {BASELINE} that fits: {fastest.baseline.tokens_per_s / 1e6:.3f} M tokens/s "
        f"({fastest.setting.machine}, {fastest.setting.mode}, {fastest.setting.seq} tokens, "
        f"{fastest.setting.micro_batches} micro-batches); highest grid {best.grid.tokens_per_s / 1e6:.3f} M; "
        f"reported {tps / 1e6:.2f} M is {tps / fastest.baseline.tokens_per_s:.1f} times the former"
    )
    return lines


def _described(one: Pair) -> str:
    setting, base, grid = one.setting, one.baseline, one.grid
    return (
        f"{setting.machine}, {setting.mode}, {setting.seq} tokens, {setting.micro_batches} micro-batch(es)"
        f"{'' if one.fits else ' (does not fit)'}: {one.ratio:.2f}; {BASELINE} waits {base.bubble:.0%} of its step for "
        f"the pipeline and {_share(base):.0%} for collectives, {grid.layout.m}x{grid.layout.n} {_share(grid):.0%} for "
        "collectives"
    )


def _share(found: Prediction) -> float:
    return sum(seconds for axis, seconds in found.waiting.items() if axis != "pipeline") / found.step


def _really_best(model: ModelShape) -> list[str]:
    """The planner's own choice in each mode, data parallelism and every stock layout included."""
    lines = [
        "really best (any exact layout of 16 GPUs that fits, up to 16 sequences per micro-batch; 2048 tokens, in",
        "decode a context of 512):",
    ]
    for machine in MACHINES:
        hardware: Hardware = load_hardware(machine)
        for mode in SEQUENCES:
            workload = Workload(mode, 512 if mode == "decode" else 2048, GLOBAL_BATCH, grad_itemsize=2)
            search = Search(exchanges=("batch", "weights"), max_micro_batch=16)
            plan = make_plan(model, GPUS, workload, hardware, search)
            best = plan.found[0]
            grid = next((found for found in plan.found if found.layout.grid), None)
            said = f"best grid {grid.layout}: {grid.tokens_per_s / 1e6:.3f} M" if grid else "no grid fits"
            lines.append(f"  {machine}, {mode}: {best.layout}: {best.tokens_per_s / 1e6:.3f} M tokens/s; {said}")
    return lines
