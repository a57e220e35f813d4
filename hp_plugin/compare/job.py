"""What all ranks of a comparison are told."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from hp_plugin.compare.entries.entrant import Entrant
from hp_plugin.compare.entries.suites import context_of


@dataclass(frozen=True)
class Job:
    """What all ranks are told.

    Args:
        entrants: the layouts, the first one being the baseline.
        impossible: layouts that stock Megatron-Core refuses, and its words.
        modes: `forward`, `train`, both, or `decode-N` for every context of N tokens.
        steps: timed steps of a layout per round and mode. rounds: rounds over all layouts.
        out: directory of the report. trace: whether to write a profiler trace of every layout.
        predict: whether to measure the machine, too, and to put the planner's predictions beside every layout.
    """

    model: str
    scale: str
    entrants: tuple[Entrant, ...]
    impossible: dict[str, str] = field(default_factory=dict)
    modes: tuple[str, ...] = ("train",)
    steps: int = 3
    rounds: int = 3
    out: Path = Path("compare")
    trace: bool = False
    predict: bool = False

    @property
    def training_modes(self) -> tuple[str, ...]:
        """Those that run on the trainer's batches."""
        return tuple(mode for mode in self.modes if context_of(mode) is None)

    @property
    def contexts(self) -> dict[str, int]:
        """Tokens that decode steps find cached, by mode; empty where none are timed."""
        return {mode: context for mode in self.modes if (context := context_of(mode)) is not None}

    @property
    def machine_path(self) -> Path:
        """Where the description of the machine goes."""
        return self.out / "machine.json"

    def trace_path(self, number: int, mode: str) -> Path:
        """Where the trace of layout number `number` goes."""
        name = "".join(letter if letter.isalnum() else "-" for letter in self.entrants[number].name)
        return self.out / f"trace-{name}-{mode}.json"
