"""A predicted step as Chrome-trace JSON, which Perfetto and chrome://tracing open."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hp_plugin.planner.seconds.prediction import Prediction

LANES = ("passes", "pipeline", "gradients", "optimizer")


def trace_events(prediction: Prediction) -> list[dict[str, Any]]:
    """Complete events (`ph: X`), one process per pipeline stage and one thread per lane, in microseconds."""
    ranks = sorted({event.rank for event in prediction.events})
    events: list[dict[str, Any]] = []
    for rank in ranks:
        name = f"stage {rank} of {prediction.layout.pp}"
        events.append({"name": "process_name", "ph": "M", "pid": rank, "tid": 0, "args": {"name": name}})
        for lane, label in enumerate(LANES):
            events.append({"name": "thread_name", "ph": "M", "pid": rank, "tid": lane, "args": {"name": label}})
    for event in prediction.events:
        events.append(
            {
                "name": event.name,
                "cat": event.lane,
                "ph": "X",
                "ts": event.start * 1e6,
                "dur": (event.end - event.start) * 1e6,
                "pid": event.rank,
                "tid": LANES.index(event.lane),
            }
        )
    return events


def write_trace(prediction: Prediction, path: Path) -> None:
    """Writes the trace of a prediction made with `full_timeline`.

    Raises:
        ValueError: the file cannot be written, or the prediction has no timeline (continuous decode).
    """
    if not prediction.events:
        raise ValueError(f"{prediction.layout}: continuous decode has no single step to draw")
    document = {"traceEvents": trace_events(prediction), "displayTimeUnit": "ms"}
    try:
        path.write_text(json.dumps(document))
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from None
