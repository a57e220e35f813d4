"""When every pass of a pipeline runs, and who waits: a discrete-event simulation of one step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hp_plugin.cost.schedule import Task, pipeline_order


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
    pp, vpp, count = pipeline.pp, pipeline.vpp, pipeline.micro_batches
    training = bool(pipeline.backward)
    orders = [pipeline_order(rank, pp, vpp, count, training) for rank in range(pp)]
    line = Timeline(
        finish=[0.0] * pp, compute=[0.0] * pp, passes=[0.0] * pp, sending=[0.0] * pp, gated=[0.0] * pp,
        last_backward=[[] for _ in range(pp)],
    )  # fmt: skip
    done: dict[tuple[bool, int, int], float] = {}
    position = [0] * pp
    progress = True
    while progress:
        progress = False
        for rank in range(pp):
            while position[rank] < len(orders[rank]):
                task = orders[rank][position[rank]]
                ready = _ready(pipeline, done, rank, task)
                if ready is None:
                    break
                _run(pipeline, line, done, rank, task, ready, record)
                position[rank] += 1
                progress = True
    assert all(position[rank] == len(orders[rank]) for rank in range(pp)), "the pipeline's orders wait for each other"
    return line


def _ready(pipeline: Pipeline, done: Mapping[tuple[bool, int, int], float], rank: int, task: Task) -> float | None:
    """When the pass's input is on its rank; None if that is not known yet."""
    stage = task.chunk * pipeline.pp + rank
    last = pipeline.pp * pipeline.vpp - 1
    if task.backward:
        before = (False, stage, task.micro_batch) if stage == last else (True, stage + 1, task.micro_batch)
        same_rank = stage == last
    else:
        if stage == 0:
            return 0.0
        before = (False, stage - 1, task.micro_batch)
        same_rank = False
    end = done.get(before)
    if end is None:
        return None
    return end + (0.0 if same_rank or pipeline.pp == 1 else pipeline.transfer)


def _run(
    pipeline: Pipeline,
    line: Timeline,
    done: dict[tuple[bool, int, int], float],
    rank: int,
    task: Task,
    ready: float,
    record: bool,
) -> None:
    stage = task.chunk * pipeline.pp + rank
    times = (pipeline.backward if task.backward else pipeline.forward)[stage]
    start = max(line.finish[rank], ready)
    place = (rank, task.chunk)
    seconds, busy = times.seconds, times.compute
    if not task.backward and task.micro_batch == 0:
        extra = pipeline.first_extra.get(place, 0.0)
        seconds, busy = seconds + extra, busy + extra
        gate, remaining = pipeline.gates.get(place, (0.0, 0.0))
        held = max(0.0, gate + remaining * seconds - (start + seconds))
        line.gated[rank] += held
        seconds += held
    if task.backward and task.micro_batch == pipeline.micro_batches - 1:
        extra = pipeline.last_extra.get(place, 0.0)
        seconds, busy = seconds + extra, busy + extra
        line.last_backward[rank].append((task.chunk, start, start + seconds))
    end = start + seconds
    done[task.backward, stage, task.micro_batch] = end
    line.compute[rank] += busy
    line.passes[rank] += seconds
    if record:
        line.events.append(Event(rank, "passes", str(task), start, end))
    ends = stage == 0 if task.backward else stage == pipeline.pp * pipeline.vpp - 1
    if pipeline.blocking and pipeline.pp > 1 and not ends:
        # Without overlap the sender waits until its message has gone.
        line.sending[rank] += pipeline.transfer
        if record:
            line.events.append(Event(rank, "pipeline", f"send {task}", end, end + pipeline.transfer))
        end += pipeline.transfer
    line.finish[rank] = end
