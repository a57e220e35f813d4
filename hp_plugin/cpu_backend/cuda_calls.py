"""What `torch.cuda` answers on a machine without CUDA: one device, one stream, nothing to wait for.

`is_available()` stays False and `device_count()` 0: only calls that upstream makes without asking are answered.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hp_plugin.cpu_backend.devices import ignore
from hp_plugin.cpu_backend.hook import TORCH, Hook


class Stream:
    """A stream on which everything has happened by the time it is asked; stands in for `torch.cuda.Stream`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device_index = 0

    def wait_stream(self, stream: Any) -> None:
        """Return at once."""

    def wait_event(self, event: Any) -> None:
        """Return at once."""

    def record_event(self, event: Event | None = None) -> Event:
        """Record `event`, or a new one, now."""
        event = event or Event()
        event.record()
        return event

    def synchronize(self) -> None:
        """Return at once."""

    def query(self) -> bool:
        """True: all work is done."""
        return True


class Event:
    """A point in time of the host's clock; stands in for `torch.cuda.Event`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._time_s: float | None = None

    def record(self, stream: Any = None) -> None:
        """Take the time now."""
        self._time_s = time.perf_counter()

    def wait(self, stream: Any = None) -> None:
        """Return at once."""

    def synchronize(self) -> None:
        """Return at once."""

    def query(self) -> bool:
        """True: the work before the event is done."""
        return True

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds from this event to `end`; raises `RuntimeError` unless both were recorded."""
        if self._time_s is None or end._time_s is None:
            raise RuntimeError("both events must be recorded before their elapsed time is known")
        return 1e3 * (end._time_s - self._time_s)


_THE_STREAM = Stream()


@contextmanager
def _stream_context(stream: Any) -> Iterator[None]:
    yield


def answer(value: Any) -> Callable[[Any], Callable[..., Any]]:
    """A replacement that always returns `value`."""
    return lambda original: lambda *args, **kwargs: value


def become(value: Any) -> Callable[[Any], Any]:
    """A replacement that is `value` itself."""
    return lambda original: value


_ASKED = "upstream asks for a device before it calls this"

HOOKS = [
    Hook("torch.cuda", "current_device", answer(0), _ASKED, TORCH, ()),
    Hook("torch.cuda", "set_device", ignore, _ASKED, TORCH, ("device",)),
    Hook("torch.cuda", "synchronize", ignore, _ASKED, TORCH, ("device",)),
    Hook("torch.cuda", "Stream", become(Stream), _ASKED, TORCH),
    Hook("torch.cuda", "Event", become(Event), _ASKED, TORCH),
    Hook("torch.cuda", "stream", become(_stream_context), _ASKED, TORCH, ("stream",)),
    Hook("torch.cuda", "current_stream", answer(_THE_STREAM), _ASKED, TORCH, ("device",)),
    Hook("torch.cuda", "default_stream", answer(_THE_STREAM), _ASKED, TORCH, ("device",)),
    Hook("torch.cuda", "set_stream", ignore, _ASKED, TORCH, ("stream",)),
    Hook("torch.cuda", "is_current_stream_capturing", answer(False), _ASKED, TORCH, ()),
    Hook("torch.cuda", "reset_peak_memory_stats", ignore, _ASKED, TORCH, ("device",)),
    # Log lines look up single figures, which a machine without CUDA does not list: each of them is 0.
    Hook("torch.cuda", "memory_stats", lambda original: lambda device=None: Counter(), _ASKED, TORCH, ("device",)),
    Hook("torch.cuda.nvtx", "range_push", ignore, _ASKED, TORCH, ("msg",)),
    Hook("torch.cuda.nvtx", "range_pop", ignore, _ASKED, TORCH, ()),
]
