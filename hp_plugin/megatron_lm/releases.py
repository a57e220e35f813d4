"""Which releases of Megatron-Core the plugin was run with (`releases.json`), and how a difference to them is said.

Standard library only: setting up and looking around must work where Megatron-Core is not installed.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("releases.json")
RUN, CHECKED, NOT_TRIED = "run", "hook points checked", "not tried"
BEGIN, END = "<!-- releases: begin -->", "<!-- releases: end -->"


@dataclass(frozen=True)
class Release:
    """What is known of one Megatron-Core release on one Python; the last four say what was run, and are else empty."""

    megatron_core: str
    python: str
    state: str
    tree: str = ""  # the tag of Megatron-LM that `hp-plugin patch` knows
    what: str = ""
    beside: str = ""  # what else was installed
    command: str = ""

    def __str__(self) -> str:
        return f"{self.state}: {self.what} ({self.beside})" if self.state == RUN else self.state


def ranges() -> dict[str, str]:
    """Distribution, or `python` -> the versions that the plugin may be installed beside, as pip writes it."""
    found: dict[str, str] = json.loads(FILE.read_text("utf-8"))["ranges"]
    return found


def listed_releases() -> tuple[Release, ...]:
    """The whole list, oldest release first."""
    rows = json.loads(FILE.read_text("utf-8"))["releases"]
    names = {"megatron-core": "megatron_core", "with": "beside"}
    return tuple(Release(**{names.get(key, key): value for key, value in row.items()}) for row in rows)


def known() -> tuple[str, ...]:
    """The Megatron-Core releases of which something was run."""
    return tuple(dict.fromkeys(row.megatron_core for row in listed_releases() if row.state == RUN))


def standing(megatron_core: str, python: str) -> Release:
    """What is known of an installed pair of versions; a Python's patch level makes no difference."""
    python = ".".join(python.split(".")[:2])
    for row in listed_releases():
        if (row.megatron_core, row.python) == (megatron_core.split("+")[0], python):
            return row
    return Release(megatron_core, python, NOT_TRIED)


def table(commands: bool) -> str:
    """The whole list as a Markdown table with the command behind every run; without commands, what was tried alone."""
    head = ["Megatron-Core", "Python", "state", "beside", *(["command"] if commands else [])]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in listed_releases():
        if row.state == NOT_TRIED and not commands:
            continue
        state = f"{row.state}: {row.what}" if row.what else row.state
        cells = [row.megatron_core, row.python, state, row.beside]
        if commands:
            cells.append(f"`{row.command}`" if row.command else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def with_table(page: str, commands: bool) -> str:
    """A page's text with the table, newly made, between its two markers.

    Raises:
        ValueError: it has not both markers, in this order.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page needs a line {BEGIN} and, below it, a line {END}")
    return f"{before}{BEGIN}\n\n{table(commands)}\n\n{END}{after}"


def check_parameters(what: str, function: Callable[..., Any], names: tuple[str, ...]) -> None:
    """Refuses an upstream function that lacks one of the parameters the plugin passes or reads.

    Raises:
        RuntimeError: names the function, its parameters, the release found and those known to work.
    """
    parameters = tuple(inspect.signature(function).parameters)
    missing = [name for name in names if name not in parameters]
    if missing:
        from megatron.core.package_info import __version__ as found  # of the tree that runs, installed or not

        raise RuntimeError(
            f"{what} has no parameter {', '.join(missing)} (it has {', '.join(parameters)}): this is Megatron-Core "
            f"{found}, and hp_plugin is known to work with {', '.join(known())}. Use one of these, or a newer hp_plugin"
        )
