"""Models by name, from files, Hugging Face's among them, and as they are written out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from math import isfinite
from pathlib import Path
from typing import Any

from hp_plugin.planner.inputs.hugging_face import fields as hugging_face
from hp_plugin.planner.inputs.model_shape import ModelShape
from hp_plugin.planner.machine.json_file import names_file, package_json, path_said, read_object
from hp_plugin.refusal import first_reasons, shown


def presets() -> dict[str, str]:
    """Names and descriptions of the models that come with the package."""
    return {name: str(entry["description"]) for name, entry in package_json("inputs/data/models.json").items()}


def load_model(text: str) -> ModelShape:
    """A shipped model by name, one from a JSON file (of these fields, or Hugging Face's), or `layers=4,D=8192,...`.

    `name,key=value,...` changes a shipped model. d defaults to D/h, g to h, ffn to 4·D.

    Raises:
        ValueError: no such model or field, a malformed value, or sizes that contradict each other.
    """
    first, _, rest = text.partition(",")
    known = package_json("inputs/data/models.json")
    if first in known:
        return _from_fields(first, {**_shape(known[first]), **_pairs(rest)})
    if "=" in first:
        return _from_fields("custom", _pairs(text))
    path = Path(first)
    if path.suffix == ".json" or names_file(first):
        return _from_file(path, rest)
    near = get_close_matches(first, known, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    ways = f"give a .json file, write layers=..,D=..,h=.. or choose from {', '.join(known)}"
    raise ValueError(first_reasons(f"unknown model {shown(first)}{hint}: {ways}"))


def _from_file(path: Path, changes: str) -> ModelShape:
    found = read_object(path, "model file")
    try:
        if hugging_face.MARK in found:
            name = path.resolve().parent.name if path.stem == "config" else path.stem
            return _from_fields(name, {**hugging_face.shape_of(found), **_pairs(changes)})
        return _from_fields(path.stem, {**_shape(found), **_pairs(changes)})
    except ValueError as error:
        raise ValueError(first_reasons(f"model file {path_said(path)}: {error}")) from None


def _shape(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in ("description", "name")}


_TYPES: Mapping[Any, tuple[tuple[type, ...], str]] = {
    "bool": ((bool,), "true or false"),
    "int": ((int,), "an integer"),
    "float": ((float, int), "a number"),
    "str": ((str,), "a word"),
    # Known of Hugging Face's files alone.
    "tuple[str, ...]": ((tuple,), "nothing in a file"),
}
"""Python types of a field's values, by its annotation, and what messages call them."""


def _pairs(text: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"model: expected key=value, got {shown(part)}")
        if key.strip() in values:
            raise ValueError(f"model: {shown(key.strip())[1:-1]} is given twice")
        if value.lower() in ("true", "false"):
            values[key.strip()] = value.lower() == "true"
            continue
        values[key.strip()] = _number(key, value)
    return values


def _number(key: str, text: str) -> Any:
    if key.strip() == "activation":
        return text
    for kind in (int, float):
        try:
            number: float = kind(text)
        except ValueError:
            continue
        if isinstance(number, int) or isfinite(number):
            return number
    raise ValueError(f"model: {shown(key)[1:-1]} takes an integer or true/false, got {shown(text)}")


def _from_fields(name: str, values: Mapping[str, Any]) -> ModelShape:
    allowed = {field.name: field.type for field in fields(ModelShape)}
    for key, value in values.items():
        if key not in allowed or key == "name":
            near = get_close_matches(key, allowed, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"model {name}: unknown field {shown(key)}{hint}")
        wanted, said = _TYPES[allowed[key]]
        if type(value) not in wanted:
            raise ValueError(f"model {name}: {key} takes {said}, got {shown(value)}")
    missing = [key for key in ("layers", "D", "h") if key not in values]
    if missing:
        raise ValueError(f"model {name}: missing {', '.join(missing)}")
    full = dict(values)
    h, hidden = full["h"], full["D"]
    full.setdefault("g", h)
    if "d" not in full:
        if h < 1 or hidden % h:
            raise ValueError(f"model {name}: D={hidden} is no multiple of h={h}: give d")
        full["d"] = hidden // h
    full.setdefault("ffn", 4 * hidden)
    return ModelShape(name=name, **full)
