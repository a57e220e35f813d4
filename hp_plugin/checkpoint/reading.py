"""Files of a checkpoint, read without running what is in them; whatever is wrong with one is told in one line.

Pickles name classes and functions, and reading one calls them. Here only those are called that a checkpoint needs;
`trusted` stands for a folder whose writer may name anything.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from hp_plugin.checkpoint.rules import TRUST_FLAG

INDEX, BACKEND = ".metadata", "metadata.json"
WAY_OUT = "restore it, or load another iteration"
_OR_TRUST = f"load another, or give {TRUST_FLAG} if you trust whoever wrote it"


class DamagedFileError(ValueError):
    """A file of a checkpoint that is not what it should be; the message names it, what is wrong and the way out."""

    def __init__(self, path: str | Path, wrong: str, way_out: str = WAY_OUT) -> None:
        super().__init__(f"checkpoint file {path} {wrong}: {way_out}")
        self._given = (path, wrong, way_out)

    def __reduce__(self) -> tuple[type, tuple[str | Path, str, str]]:
        return type(self), self._given  # errors cross from rank to rank by pickle


class UntrustedFileError(DamagedFileError):
    """A file of a checkpoint that names what may run code when it is read."""

    def __init__(self, path: str | Path, named: str) -> None:
        super().__init__(
            path,
            f"names {named}, which reading it would call and which no checkpoint needs",
            _OR_TRUST,
        )
        self._named = (path, named)

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return type(self), self._named


def read_index(folder: str | Path, trusted: bool = False) -> Metadata:
    """The index of a `torch_dist` checkpoint, `.metadata`: which piece of which tensor lies where.

    Raises:
        DamagedFileError: it is missing, empty, unreadable, garbled or no index, or names what no index needs.
    """
    path = Path(folder) / INDEX
    with readable(path) as file:
        status = os.fstat(file.fileno())
        return _index(path, status.st_size, status.st_mtime_ns, trusted)


def read_backend(folder: str | Path) -> dict[str, Any]:
    """What `metadata.json` says about the format.

    Raises:
        DamagedFileError: it is missing, empty, unreadable, garbled or says nothing of a format.
    """
    path = Path(folder) / BACKEND
    with readable(path) as file:
        described = json.loads(file.read())
    if not isinstance(described, dict) or not isinstance(described.get("sharded_backend"), str):
        raise DamagedFileError(path, "does not name the format of the checkpoint")
    return described


def read_torch_file(path: str | Path, trusted: bool = False) -> dict[Any, Any]:
    """A dictionary that `torch.save` wrote, on the host.

    Raises:
        DamagedFileError: it is missing, empty, unreadable, garbled or no dictionary, or names what no checkpoint needs.
    """
    with readable(path) as file:
        state = unpickled(path, file, trusted)
    if not isinstance(state, dict):
        raise DamagedFileError(path, f"holds a {type(state).__name__} instead of a dictionary")
    return state


def read_object(path: Path, place: _StorageInfo, trusted: bool = False) -> Any:
    """An object among the shards, which torch itself unpickles as it is.

    Raises:
        DamagedFileError: it is garbled, or names what no checkpoint needs.
    """
    with readable(path) as file:
        file.seek(place.offset)
        found = unpickled(path, io.BytesIO(file.read(place.length)), trusted)
        if not isinstance(found, io.BytesIO):
            return found
        found.seek(0)  # some releases save the bytes of what was saved
        return unpickled(path, found, trusted)


def unpickled(path: str | Path, file: BinaryIO, trusted: bool = False) -> Any:
    """What `torch.save` wrote to a part of this file.

    Raises:
        UntrustedFileError: it names what no checkpoint needs.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a protocol that is not torch's
            return torch.load(file, map_location="cpu", weights_only=not trusted)
    except pickle.UnpicklingError:
        if not zipfile.is_zipfile(file):  # of which torch makes its files
            raise DamagedFileError(path, "is garbled or cut off") from None
        file.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                named = torch.serialization.get_unsafe_globals_in_checkpoint(file)
            except Exception:  # nor does it know all that a pickle can hold
                named = []
        if named:
            raise UntrustedFileError(path, ", ".join(named[:3])) from None
        raise DamagedFileError(path, "is garbled, or names what reading it would call", _OR_TRUST) from None


@contextmanager
def readable(path: str | Path) -> Iterator[BinaryIO]:
    """The open file; whatever goes wrong within the block is the file's fault.

    Raises:
        DamagedFileError: what is wrong with it.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise DamagedFileError(path, "is empty")
            yield file
    except DamagedFileError:
        raise
    except FileNotFoundError:
        raise DamagedFileError(path, "is missing") from None
    except OSError as error:
        raise DamagedFileError(
            path, f"cannot be read ({error.strerror or error})", "see to it, or load another"
        ) from None
    except Exception as error:  # what a garbled pickle can raise has no end
        raise DamagedFileError(path, f"is garbled or cut off ({_said(error)})") from None


@contextmanager
def trusting(trusted: bool) -> Iterator[None]:
    """Within it Megatron-Core reads `common.pt` as it did before torch 2.6, running what is in it, if `trusted`."""
    if not trusted:
        yield
        return
    # torch's own switch, for calls that leave the choice open.
    before = os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "")
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", UserWarning)
            yield
    finally:
        os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = before or "0"


def _said(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:80] or type(error).__name__


@lru_cache(maxsize=2)  # an index of a large model has millions of entries, and several checks look into it
def _index(path: Path, size: int, modified_ns: int, trusted: bool) -> Metadata:
    content = io.BytesIO(path.read_bytes())
    index = pickle.load(content) if trusted else _IndexUnpickler(content, path).load()
    wrong = _what_is_wrong(index)
    if wrong:
        raise DamagedFileError(path, f"is no index of a checkpoint: {wrong}")
    assert isinstance(index, Metadata)
    return index


def _what_is_wrong(index: Any) -> str:
    if not isinstance(index, Metadata):
        return f"it holds a {type(index).__name__}"
    stored, places = index.state_dict_metadata, index.storage_data
    if not isinstance(stored, dict) or not isinstance(places, dict):
        return "it lists no tensors"
    for key, value in stored.items():
        if not isinstance(key, str) or not isinstance(value, (TensorStorageMetadata, BytesStorageMetadata)):
            return f"its entry {str(key)[:50]!r} is no tensor"
    for piece, place in places.items():
        if not isinstance(piece, MetadataIndex) or not isinstance(place, _StorageInfo):
            return "a piece has no place"
        name, numbers = place.relative_path, (place.offset, place.length)
        if not isinstance(name, str) or not name or Path(name).is_absolute() or ".." in Path(name).parts:
            return f"a piece lies outside the folder, in {str(name)[:50]!r}"
        if not all(isinstance(number, int) and number >= 0 for number in numbers):
            return f"a piece of {name} lies at {numbers}"
    return ""


_INDEX_MODULES = tuple(f"torch.distributed.checkpoint.{name}" for name in ("metadata", "planner", "filesystem"))
_INDEX_NAMES = {
    *(("torch", "Size"), ("torch", "device"), ("torch.serialization", "_get_layout")),
    *(("collections", "OrderedDict"), ("builtins", "set"), ("builtins", "frozenset"), ("builtins", "slice")),
    *(("pathlib", "PosixPath"), ("pathlib", "PurePosixPath"), ("pathlib._local", "PosixPath")),
}


class _IndexUnpickler(pickle.Unpickler):
    """Calls torch's own records and types of tensors, nothing else."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _INDEX_NAMES:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module in _INDEX_MODULES and "." not in name:
            found = super().find_class(module, name)
            if (
                isinstance(found, type)
                and found.__module__ == module
                and (is_dataclass(found) or issubclass(found, Enum))
            ):
                return found
        raise UntrustedFileError(self._path, f"{module}.{name}")
