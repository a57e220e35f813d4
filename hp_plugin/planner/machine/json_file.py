"""Reads JSON: the planner's own data files, and a user's, whose every mistake is named with the file."""

from __future__ import annotations

import json
from importlib import resources
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hp_plugin.refusal import shown

if TYPE_CHECKING:  # its place differs between Python 3.10 and 3.11
    from importlib.abc import Traversable


def package_json(name: str) -> Any:
    """One of the planner's data files, by its path in the package."""
    return json.loads(_packaged(name).read_text(encoding="utf-8"))


def package_folder(name: str) -> list[str]:
    """Names of the files in one of the planner's data folders, sorted."""
    return sorted(entry.name for entry in _packaged(name).iterdir())


def _packaged(name: str) -> Traversable:
    return resources.files("hp_plugin.planner").joinpath(*name.split("/"))


def read_object(path: Path, what: str) -> dict[str, Any]:
    """The object in a JSON file; `what` names its role in messages.

    Raises:
        ValueError: the file cannot be read, is no JSON, holds no object, or says a key twice.
    """
    try:
        found = json.loads(
            path.read_text(encoding="utf-8-sig"),
            object_pairs_hook=_once,
            parse_float=_finite,
            parse_int=_integer,
            parse_constant=_finite,
        )
    except OSError as error:
        raise ValueError(f"{what} {path_said(path)}: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{what} {path_said(path)}, line {error.lineno}: not JSON ({error.msg})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} {path_said(path)}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except RecursionError:
        raise ValueError(f"{what} {path_said(path)}: the JSON is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{what} {path_said(path)}: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{what} {path_said(path)}: expected one JSON object, got {type(found).__name__}")
    return found


def names_file(text: str) -> bool:
    """Whether there is a file of this name; of one that no file can have, there is not."""
    try:
        return Path(text).is_file()
    except (OSError, ValueError):
        return False


def path_said(path: Path) -> str:
    """A path as messages show it: of a long one the end."""
    text = str(path)
    return text if len(text) <= 160 else f"…{text[-150:]}"


DIGITS = 30
"""Digits of an integer beyond which it is taken for damage."""


def _finite(text: str) -> float:
    number = float(text)
    if not isfinite(number):
        raise ValueError(f"{shown(text)} is no finite number")
    return number


def _integer(text: str) -> int:
    if len(text) > DIGITS:
        raise ValueError(f"{shown(text)} is no number that means anything here")
    return int(text)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{shown(twice)} is given twice")
    return found
