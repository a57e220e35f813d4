"""When every pass of a pipeline runs, and who waits: a discrete-event simulation of one step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

from hp_plugin.planner.counts.schedule import Task, pipeline_order


@dataclass(frozen=True)
class Event:
    """A stretch of one pipeline rank's time, in seconds: lane `passes`, `pipeline`, `gradients` or `optimizer`."""

    rank: int
    lane: str
    name: str
    start: float
    end: float


@dataclass(frozen=True)
class PassTimes:
    """Seconds of one pass through one virtual stage: all of it, and the part in which kernels run."""

    seconds: float
    compute: float


@dataclass
class Timeline:
    """A simulated step.

    Args:
        finish: when each rank's last pass ends. compute: seconds its kernels run. sending: seconds it is held up by
            its own sends and receives. gated: seconds its first passes wait for gathered weights.
        last_backward: per rank, (chunk, start, end) of each chunk's last backward pass, in order.
    """

    events: list[Event] = field(default_factory=list)
    finish: list[float] = field(default_factory=list)
    compute: list[float] = field(default_factory=list)
    passes: list[float] = field(default_factory=list)
    sending: list[float] = field(default_factory=list)
    gated: list[float] = field(default_factory=list)
    last_backward: list[list[tuple[int, float, float]]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """When the last rank is done."""
        return max(self.finish)


@dataclass(frozen=True)
class Pipeline:
    """What the simulation needs to know.

    Args:
        forward, backward: per virtual stage (chunk · pp + rank), the times of a pass; backward empty without training.
        transfer: seconds of one activation's way to the next stage. blocking: whether both ranks wait for it
            (1F1B; interleaved schedules overlap it).
        gates: per (rank, chunk), (seconds until all its weights are there, share of the pass that then remains at
            least); the first forward pass of the chunk cannot end earlier.
        first_extra, last_extra: per (rank, chunk), seconds added to the first forward and the last backward pass.
    """

    pp: int
    vpp: int
    micro_batches: int
    forward: Sequence[PassTimes]
    backward: Sequence[PassTimes]
    transfer: float = 0.0
    blocking: bool = True
    gates: Mapping[tuple[int, int], tuple[float, float]] = field(default_factory=dict)
    first_extra: Mapping[tuple[int, int], float] = field(default_factory=dict)
    last_extra: Mapping[tuple[int, int], float] = field(default_factory=dict)


def simulate(pipeline: Pipeline, record: bool = True) -> Timeline:
    """Runs every rank's passes in order, each as soon as its input is there and its rank is free.

    A pass sends its result when it ends; the receiver has it `transfer` seconds later. Events are kept
    if `record`.
    """
    pp = pipeline.pp
    training = bool(pipeline.backward)
    run = _Run(pipeline)
    orders = [pipeline_order(rank, pp, pipeline.vpp, pipeline.micro_batches, training) for rank in range(pp)]
    position = [0] * pp
    progress = True
    while progress:
        progress = False
        for rank, order in enumerate(orders):
            at = run.advance(rank, order, position[rank], record)
            progress |= at > position[rank]
            position[rank] = at
    assert all(at == len(order) for at, order in zip(position, orders, strict=True)), "the orders wait for each other"
    return run.line


class _Run:
    """A simulation under way."""

    def __init__(self, pipeline: Pipeline) -> None:
        pp, stages = pipeline.pp, pipeline.pp * pipeline.vpp
        self.pipeline = pipeline
        self.line = Timeline(
            finish=[0.0] * pp, compute=[0.0] * pp, passes=[0.0] * pp, sending=[0.0] * pp, gated=[0.0] * pp,
            last_backward=[[] for _ in range(pp)],
        )  # fmt: skip
        self._last = stages - 1
        self._ahead_times = [(times.seconds, times.compute) for times in pipeline.forward]
        self._back_times = [(times.seconds, times.compute) for times in pipeline.backward]
        self._between = pipeline.transfer if pp > 1 else 0.0
        self._blocked = self._between if pipeline.blocking else 0.0
        # When each pass of each stage ended, by micro-batch; None while it has not run.
        self._forward: list[list[float | None]] = [[None] * pipeline.micro_batches for _ in range(stages)]
        self._backward: list[list[float | None]] = [[None] * pipeline.micro_batches for _ in range(stages)]

    def advance(self, rank: int, order: Sequence[Task], at: int, record: bool) -> int:
        """Runs a rank's passes from number `at` on, as far as their inputs are known; returns the next one's number.

        What a search for layouts spends most of its time on, so everything is looked up once.
        """
        pipeline, line = self.pipeline, self.line
        pp, last, between, blocked = pipeline.pp, self._last, self._between, self._blocked
        forward, backward, final = self._forward, self._backward, pipeline.micro_batches - 1
        ahead_times, back_times = self._ahead_times, self._back_times
        finish, compute, passes = line.finish[rank], line.compute[rank], line.passes[rank]
        for task in islice(order, at, None):
            back, chunk, micro_batch = task
            stage = chunk * pp + rank
            if back and stage == last:
                before, waited = forward[stage][micro_batch], 0.0
            elif back or stage:
                before, waited = (backward[stage + 1] if back else forward[stage - 1])[micro_batch], between
            else:
                before, waited = 0.0, 0.0
            if before is None:
                break
            ready = before + waited
            start = ready if ready > finish else finish
            seconds, busy = (back_times if back else ahead_times)[stage]
            if back:
                if micro_batch == final:
                    extra = pipeline.last_extra.get((rank, chunk), 0.0)
                    seconds, busy = seconds + extra, busy + extra
                    line.last_backward[rank].append((chunk, start, start + seconds))
            elif micro_batch == 0:
                seconds, busy = self._first(rank, chunk, start, seconds, busy)
            finish = start + seconds
            (backward if back else forward)[stage][micro_batch] = finish
            compute += busy
            passes += seconds
            if record:
                line.events.append(Event(rank, "passes", str(task), start, finish))
            if blocked and stage != (0 if back else last):
                # Without overlap the sender waits until its message has gone.
                line.sending[rank] += blocked
                if record:
                    line.events.append(Event(rank, "pipeline", f"send {task}", finish, finish + blocked))
                finish += blocked
            at += 1
        line.finish[rank], line.compute[rank], line.passes[rank] = finish, compute, passes
        return at

    def _first(self, rank: int, chunk: int, start: float, seconds: float, busy: float) -> tuple[float, float]:
        """A chunk's first forward pass: slowed down and held up by the gathering of its weights."""
        pipeline = self.pipeline
        extra = pipeline.first_extra.get((rank, chunk), 0.0)
        seconds, busy = seconds + extra, busy + extra
        gate, remaining = pipeline.gates.get((rank, chunk), (0.0, 0.0))
        held = max(0.0, gate + remaining * seconds - (start + seconds))
        self.line.gated[rank] += held
        return seconds + held, busy
