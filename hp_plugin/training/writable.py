"""Whether a path can be written to, found out before training and without leaving anything there."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

_LONGEST_INSIDE = len("iter_0000001.partial-abcdefgh")
"""Characters of the longest name that is made in a folder, or added to a file's while it is written."""
_PATH_INSIDE = 128
"""Characters of the longest path beneath a folder: an iteration, a rank, a file."""


def unwritable_folder(name: str) -> str | None:
    """What keeps a folder from being made or written to, and the way out; None if nothing does.

    Every rank asks for its own node. The folder itself is not made: what comes after may refuse the run.
    """
    path = Path(name)
    if os.path.exists(name) and not os.path.isdir(name):
        return f"{_shown(name)} is a file: name a directory"
    return _unusable(name, path, _PATH_INSIDE)


def unwritable_file(name: str) -> str | None:
    """The same of a file, which is replaced when it is complete."""
    path = Path(name)
    if name and os.path.isdir(name):
        return f"{_shown(name)} is a directory: name a file"
    return _unusable(name, path.parent, len(path.name) + _LONGEST_INSIDE) or _too_long(name, path, 0, _LONGEST_INSIDE)


def _unusable(name: str, folder: Path, inside: int) -> str | None:
    if not name.strip():
        return f"{name!r} is empty: name a path, or leave the flag out"
    if "\0" in name:
        return f"{_shown(name)} has a null character in it: name another"
    if os.path.islink(name) and not os.path.exists(name):
        return (
            f"{_shown(name)} is a link to {_shown(os.readlink(name))}, which does not exist: make it, or name another"
        )
    try:
        too_long = _too_long(name, folder.absolute(), inside, 0)
        if too_long is not None:
            return too_long
        there = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
        if os.path.islink(there) and not there.exists():
            return f"{_shown(name)}: {there} is a link to what does not exist: make it, or name another"
        if not there.is_dir():
            return f"{_shown(name)}: {there} is a file: name another"
        with tempfile.TemporaryFile(dir=there) as probe:
            probe.write(b"written")
            probe.flush()
    except OSError as error:
        return f"{_shown(name)} cannot be written to ({error.strerror}): name another, or make room for it"
    return None


def _too_long(name: str, path: Path, inside: int, added: int) -> str | None:
    there = next(place for place in (path, *path.absolute().parents) if os.path.isdir(place))
    longest, whole = os.pathconf(there, "PC_NAME_MAX"), os.pathconf(there, "PC_PATH_MAX")
    if any(len(os.fsencode(part)) + added > longest for part in path.parts) or len(os.fsencode(path)) + inside > whole:
        return f"{_shown(name)} is too long, {len(name)} characters: name a shorter path"
    return None


def _shown(name: str) -> str:
    return repr(name if len(name) < 100 else name[:97] + "...")
