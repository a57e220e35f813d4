"""Why something cannot run, as a value: programs read its kind and amount, people its text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

_SHOWN = 60  # characters of a wrong value that a message repeats


def shown(value: object) -> str:
    """A value as a message repeats it: the first characters of its `repr`, on one line."""
    try:
        text = repr(value)
    except Exception:  # a number of too many digits, a list in itself ten thousand deep
        text = f"a value of type {type(value).__name__} that cannot be shown"
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


def shorten(text: str, longest: int = 120) -> str:
    """What another library says, on one line and not at any length."""
    line = " ".join(text.split())
    return line if len(line) <= longest else line[: longest - 1] + "…"


LONGEST = 300
"""Characters of a message that a command prints; longer ones are read by nobody."""


def first_reasons(text: str, most: int = LONGEST) -> str:
    """A message of one line and at most so many characters: of several reasons the first ones."""
    text = " ".join(text.split())
    if len(text) <= most:
        return text
    kept = text[: most - 3]
    # The last reason that is whole, unless that is hardly anything.
    end = kept.rfind("; ")
    return f"{kept[:end]}; …" if end > most // 2 else f"{kept}…"


@dataclass(frozen=True)
class Refusal:
    """One reason why a model, a layout or an exchange cannot run as asked.

    Args:
        kind: one word by which programs tell reasons apart (`memory`, `heads`, `batch`, ...).
        text: the reason and the way out, for people; nothing parses it.
        amount: by how much it fails, in the unit of its kind (`memory`: bytes); 0 where there is nothing to count.
    """

    kind: str
    text: str
    amount: float = 0.0

    def __str__(self) -> str:
        return self.text


class RefusedError(ValueError):
    """A request that was refused: its message is for people, `refusals` for programs.

    Args:
        refusals: all reasons, which the message joins; or a message, of which Megatron-Core's `build_module` makes
            another error of the same class.
        before, after: what the message begins and ends with: what was asked for, and a way out.
    """

    def __init__(self, refusals: Iterable[Refusal] | str, before: str = "", after: str = "") -> None:
        reasons = [Refusal("unknown", refusals)] if isinstance(refusals, str) else refusals
        self.refusals, self._around = tuple(reasons), (before, after)
        super().__init__(before + "; ".join(refusal.text for refusal in self.refusals) + after)

    def __reduce__(self) -> tuple[type, tuple[tuple[Refusal, ...], str, str]]:
        return type(self), (self.refusals, *self._around)  # errors cross from rank to rank by pickle
