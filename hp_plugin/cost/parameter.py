"""A figure with its source: nothing enters a prediction without one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

KINDS = {
    "measured": "published measurement",
    "datasheet": "vendor's data sheet",
    "modelled": "published model",
    "derived": "computed from published figures",
    "calibrated": "fitted to the calibration rows of --validate",
    "assumed": "assumption of this planner",
    "user": "given by the user",
    "here": "measured on the machine itself by `hp-plugin compare --predict`",
}


@dataclass(frozen=True)
class Parameter:
    """A value in SI units, what kind of figure it is (a key of `KINDS`) and where it comes from."""

    value: float
    kind: str
    source: str

    @classmethod
    def from_json(cls, name: str, entry: object) -> Parameter:
        """Reads `{"value": ..., "kind": ..., "source": ...}`.

        Raises:
            ValueError: a field is missing, the value is no positive number, or the kind is unknown.
        """
        if not isinstance(entry, Mapping):
            raise ValueError(f"{name}: expected an object with value, kind and source, got {entry!r}")
        fields: Mapping[str, Any] = entry
        missing = [field for field in ("value", "kind", "source") if field not in fields]
        if missing:
            raise ValueError(f"{name}: missing {', '.join(missing)}")
        value = fields["value"]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise ValueError(f"{name}: value must be a positive number, got {value!r}")
        if fields["kind"] not in KINDS:
            raise ValueError(f"{name}: kind {fields['kind']!r} is none of {', '.join(KINDS)}")
        return cls(float(value), str(fields["kind"]), str(fields["source"]))
