"""What every rank begins with."""

from __future__ import annotations

from hp_plugin.processes.interrupts import take_interrupts
from hp_plugin.processes.lifetime import end_with_launcher, tie_children


def begin_rank() -> None:
    """Ties this process to torchrun and its children to itself, and has Ctrl-C end it in one line.

    To be called first of all in a program that ranks run: before torch is imported and anything is started.
    """
    end_with_launcher()
    tie_children()
    take_interrupts()
