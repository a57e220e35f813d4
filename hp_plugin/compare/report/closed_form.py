"""What the planner says that a layout sends, beside what `compare` counts."""

from __future__ import annotations

from hp_plugin.compare.entries.entrant import Entrant
from hp_plugin.compare.entries.planned import group_sizes, share_of
from hp_plugin.planner.counts.step import sent_bytes


def closed_form_bytes(entrant: Entrant, mode: str) -> dict[tuple[str, str], float]:
    """Bytes that a rank sends in one step by (axis, kind), averaged over pipeline stages.

    Counted from the layout's programs (`hp_plugin.planner.counts`), each collective by its ring's share of the buffer
    (`hp_plugin.planner.machine.collectives.wire_factor`); nothing here is measured.
    """
    return sent_bytes(share_of(entrant, mode), group_sizes(entrant))
