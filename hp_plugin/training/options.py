"""What an option of the trainer may be, as data beside its definition, and the one check of it for all who set options.

The command line, JSON files and Python all end in a configuration whose fields were made with `option` and `required`;
it calls `settled_values` once, whoever built it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any

from hp_plugin.refusal import shown

_LARGEST = 2**63 - 1  # what a tensor holds


@dataclass(frozen=True)
class Domain:
    """The numbers that an option may be, in words and as bounds; infinities and NaN are in none.

    Args:
        words: what follows "must be" in messages and stands in the help.
        low, high: bounds, or None. With `open_low` (`open_high`) the bound itself is not in it.
    """

    words: str
    low: float | None = None
    high: float | None = None
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, number: float) -> bool:
        if isinstance(number, float) and not math.isfinite(number):
            return False
        if self.low is not None and (number < self.low or (self.open_low and number == self.low)):
            return False
        return self.high is None or not (number > self.high or (self.open_high and number == self.high))


POSITIVE = Domain("positive", 0, open_low=True)
NOT_NEGATIVE = Domain("at least 0", 0)
PART = Domain("above 0 and at most 1", 0, 1, open_low=True)
BELOW_ONE = Domain("at least 0 and below 1", 0, 1, open_high=True)
SEED = Domain("at least 0 and below 2**31", 0, 2**31, open_high=True)
"""NumPy takes 32 bits, and pipeline stages count up from the seed."""


def option(default: Any, text: str, domain: Domain | None = None, choices: tuple[str, ...] | None = None) -> Any:
    """A dataclass field with a default, its help text and what it may be."""
    return field(default=default, metadata={"help": text, "domain": domain, "choices": choices})


def required(text: str, domain: Domain | None = None) -> Any:
    """A dataclass field without a default."""
    return field(metadata={"help": text, "domain": domain, "choices": None})


def flag(name: str) -> str:
    """An option's name on the command line."""
    return "--" + name.replace("_", "-")


def kind_of(known: Field[Any]) -> str:
    """An option's annotation without its `| None`; annotations are strings here."""
    return str(known.type).removesuffix(" | None")


def settled_values(options: Any) -> dict[str, Any]:
    """The values of a dataclass of options that are not of their own type yet, as that type has them.

    An integer for a fraction, a list for a tuple and a path for its name are meant well and changed; everything else
    is refused.

    Raises:
        ValueError: a value is of another type, no finite number, not in its domain or none of the choices.
    """
    settled = {}
    for known in fields(options):
        value = getattr(options, known.name)
        own = settled_value(known, value)
        if own is not value:
            settled[known.name] = own
    return settled


def check_names(kind: type, given: Mapping[str, Any]) -> None:
    """Refuses names that are none of the options of `kind`, and required ones that are missing.

    Raises:
        ValueError: names the first of them.
    """
    names = {known.name: known.default is MISSING for known in fields(kind)}
    for name in given:
        if name not in names:
            near = get_close_matches(str(name), names, n=1)
            raise ValueError(f"unknown key {shown(name)}" + (f"; did you mean {near[0]}?" if near else ""))
    missing = [name for name, needed in names.items() if needed and name not in given]
    if missing:
        raise ValueError(f"missing {', '.join(missing)}")


def settled_value(known: Field[Any], value: Any) -> Any:
    """One option's value in its own type.

    Raises:
        ValueError: see `settled_values`.
    """
    if value is None and str(known.type).endswith("| None"):
        return None
    kind, name, choices = kind_of(known), flag(known.name), known.metadata["choices"]
    if kind.startswith("tuple"):
        return _tuple(name, value, kind, choices, known.metadata["domain"])
    settled = _SCALARS[kind](value)
    if settled is None:
        raise ValueError(f"{name} must be {_WORDS[kind]}, got {shown(value)}")
    domain = known.metadata["domain"]
    if kind == "int" and abs(settled) > _LARGEST:
        raise ValueError(f"{name} must be an integer below 2**63, got {shown(value)}")
    if kind == "float" and not math.isfinite(settled):
        raise ValueError(f"{name} must be {domain.words if domain else 'a finite number'}, got {shown(value)}")
    if domain is not None and settled not in domain:
        raise ValueError(f"{name} must be {domain.words}, got {shown(value)}")
    if choices is not None:
        _check_choice(name, settled, choices)
    return settled


def _tuple(name: str, value: Any, kind: str, choices: tuple[str, ...] | None, domain: Domain | None) -> tuple[Any, ...]:
    pair = kind == "tuple[int, int]"
    scalar = _SCALARS["int" if pair else "str"]
    items = [scalar(item) for item in value] if isinstance(value, (list, tuple)) else []
    if not items or None in items or (pair and len(items) != 2):
        wanted = "two integers" if pair else "a list of at least one word"
        raise ValueError(f"{name} must be {wanted}, got {shown(value)}")
    for item in items:
        if domain is not None and item not in domain:
            raise ValueError(f"{name} must be two integers, each {domain.words}, got {shown(value)}")
        if choices is not None:
            _check_choice(name, item, choices)
    # The very same object where nothing was to change.
    return value if isinstance(value, tuple) and tuple(items) == value else tuple(items)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        near = get_close_matches(value, choices, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {shown(value)}{hint}")


def _boolean(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def _integer(value: Any) -> int | None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        return None
    return value if type(value) is int else int(value)


def _fraction(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    if type(value) is float:
        return value
    try:
        return float(value)
    except OverflowError:  # an integer beyond all fractions
        return math.inf


def _word(value: Any) -> str | None:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    return value if isinstance(value, str) else None


_SCALARS = {"bool": _boolean, "int": _integer, "float": _fraction, "str": _word}
_WORDS = {"bool": "true or false", "int": "an integer", "float": "a number", "str": "a string"}
