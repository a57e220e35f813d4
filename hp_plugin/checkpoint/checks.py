"""What a checkpoint must have, and must not, to be loaded here, said before anything of it is loaded."""

from __future__ import annotations

import os
import re
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.package_info import __version__ as MEGATRON_CORE
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from hp_plugin.checkpoint.pieces import only_described
from hp_plugin.checkpoint.reading import (
    BACKEND,
    INDEX,
    DamagedFileError,
    read_backend,
    read_index,
    read_object,
    read_torch_file,
    readable,
)
from hp_plugin.upstream.checkpoint_format import (
    COMMON_FILE,
    common_state_is_sharded,
    is_common_state,
    reads_sharded_common_state,
)

SHOWN = 3
_BACKEND = "torch_dist"
_NO_WEIGHTS = ("optimizer.", "chained_")
"""How Megatron-Core's keys of optimizer state begin."""


class WrongModelError(ValueError):
    """The checkpoint is of another model; raised on all ranks alike."""


def check_files(folder: str | Path, trusted: bool = False) -> None:
    """Refuses a checkpoint folder with a missing or damaged file; reads the index and the common state, no shard.

    Args:
        trusted: whether reading it may run what its writer has put there.

    Raises:
        DamagedFileError: names the file, or the first of them.
        ValueError: this Megatron-Core is too old for the format.
    """
    folder = Path(folder)
    backend = read_backend(folder)["sharded_backend"]
    if backend != _BACKEND:
        raise DamagedFileError(folder / BACKEND, f"names the format {backend!r}, not {_BACKEND}", "convert it first")
    index = read_index(folder, trusted)
    if common_state_is_sharded(index) and not reads_sharded_common_state():
        raise ValueError(
            f"checkpoint {folder} keeps its common state among the shards, as Megatron-Core 0.19 and newer write it, "
            f"and this is {MEGATRON_CORE}, which looks for {COMMON_FILE}: load it with 0.19 or newer"
        )
    ends: dict[str, int] = {}
    for piece in index.storage_data.values():
        ends[piece.relative_path] = max(ends.get(piece.relative_path, 0), piece.offset + piece.length)
    for name, end in sorted(ends.items()):
        with readable(folder / name) as file:
            size = os.fstat(file.fileno()).st_size
        if size < end:
            raise DamagedFileError(folder / name, f"is truncated ({size} bytes, where its pieces end at {end})")
    _read_common_state(folder, index, trusted)


def read_common_state(folder: str | Path, trusted: bool = False) -> dict[str, Any]:
    """What a checkpoint holds beside its tensors, after `check_files`.

    Raises:
        DamagedFileError: it is garbled, or without what a checkpoint has.
    """
    path, state = _read_common_state(Path(folder), read_index(folder, trusted), trusted)
    if not isinstance(state.get("args", Namespace()), Namespace):
        raise DamagedFileError(path, "holds no arguments under the name args")
    return state


def _read_common_state(folder: Path, index: Metadata, trusted: bool) -> tuple[Path, dict[Any, Any]]:
    """The common state and the file it is in; a shard is read here, since torch would run what the object names."""
    if not common_state_is_sharded(index):
        return folder / COMMON_FILE, read_torch_file(folder / COMMON_FILE, trusted)
    place = next((place for piece, place in index.storage_data.items() if is_common_state(piece.fqn)), None)
    if place is None:
        raise DamagedFileError(folder / INDEX, "has no place for the common state")
    path = folder / place.relative_path
    state = read_object(path, place, trusted)
    if not isinstance(state, list) or not state or not isinstance(state[0], dict):
        raise DamagedFileError(path, "holds a common state of another type")
    return path, state[0]


def check_tensors(sharded_state_dict: dict[str, Any], folder: str | Path, trusted: bool = False) -> None:
    """Refuses a checkpoint of another model, on all ranks together; a collective call over the default group.

    Args:
        sharded_state_dict: what is to be loaded, as `dist_checkpointing.load` takes it.

    Raises:
        WrongModelError: names the first tensors that are not there, are left over or have another global shape.
    """
    stored = read_index(folder, trusted).state_dict_metadata
    complaints = []
    for tensor in _expected(sharded_state_dict):
        size = getattr(stored.get(tensor.key), "size", None)
        if size is None:
            complaints.append(f"{tensor.key} {tuple(tensor.global_shape)} is not in the checkpoint")
        elif tuple(size) != tuple(tensor.global_shape) and not tensor.allow_shape_mismatch:
            complaints.append(f"{tensor.key} is {tuple(size)} there and {tuple(tensor.global_shape)} here")
    complaints += _left_over(sharded_state_dict, stored)
    refuse_together(complaints, folder)


def check_state(modules: Mapping[str, nn.Module], state: Mapping[str, Any], file: str | Path) -> None:
    """Refuses a rank's own file of another model, on all ranks together; a collective call over the default group.

    Args:
        modules: what the file's parts are to be loaded into, by their names in it.
        state: what the file holds; empty where it could not be read.

    Raises:
        WrongModelError: names the first tensors that are missing, left over or of another shape on any rank.
    """
    complaints: list[str] = []
    for part, module in modules.items():
        ours, theirs = _shapes(module.state_dict()), _shapes(state.get(part, {}))
        complaints += [f"{name} {ours[name]} is not in the file" for name in ours if name not in theirs]
        complaints += [f"{name} {theirs[name]} is left over{explained(name)}" for name in theirs if name not in ours]
        complaints += [
            f"{name} is {theirs[name]} there and {ours[name]} here"
            for name in ours
            if ours[name] != theirs.get(name, ours[name])
        ]
    refuse_together(complaints, file)


def refuse_together(complaints: list[str], source: str | Path, about: str = "is of another model") -> None:
    """Raises the same error on all ranks if any of them has a complaint; a collective call over the default group.

    Raises:
        WrongModelError: the first complaints of all ranks.
    """
    everyone: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, complaints)
    said = list(dict.fromkeys(complaint for complaints in everyone for complaint in complaints))
    if said:
        more = f" (and {len(said) - SHOWN} more)" if len(said) > SHOWN else ""
        raise WrongModelError(f"checkpoint {source} {about}: " + "; ".join(said[:SHOWN]) + more)


_FLAGS = (
    (r"self_attention\.linear_qkv\.bias$", "--add-qkv-bias, or no --disable-bias-linear"),
    (r"(linear_\w+|router|experts)\.bias$|\.bias\d*$", "no --disable-bias-linear, or --normalization LayerNorm"),
    (r"position_embeddings", "--position-embedding-type learned_absolute"),
    (r"output_layer\.weight$", "--untie-embeddings-and-output-weights"),
    (r"[qk]_layernorm", "--qk-layernorm"),
    (r"experts|router", "--num-experts"),
    (r"\.mtp\.|^mtp\.", "--mtp-num-layers"),
)


def explained(name: str) -> str:
    """The flags that would give a model a tensor of this name, in brackets; nothing where none is known."""
    flags = next((flags for pattern, flags in _FLAGS if re.search(pattern, name)), None)
    return "" if flags is None else f" (it comes from {flags})"


def _left_over(sharded_state_dict: dict[str, Any], stored: Mapping[str, Any]) -> list[str]:
    """Weights in the checkpoint that no rank asks for, said by the first rank; a collective call.

    Optimizer state follows the weights, and may be left out on purpose.
    """
    own = {tensor.key for tensor in _expected(sharded_state_dict)}
    everyone: list[set[str]] = [set() for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, own)
    if dist.get_rank() > 0:
        return []
    wanted = set().union(*everyone)
    return [
        f"{key} {tuple(kept.size)} is left over{explained(key)}"
        for key, kept in stored.items()
        if isinstance(kept, TensorStorageMetadata) and key not in wanted and not key.startswith(_NO_WEIGHTS)
    ]


def _shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items() if isinstance(value, Tensor)}


def _expected(sharded_state_dict: dict[str, Any]) -> list[ShardedTensor]:
    found: list[ShardedTensor] = []
    for entry in nested_values(extract_sharded_tensors_and_factories(sharded_state_dict)[0]):
        with only_described():
            built = entry.build() if isinstance(entry, ShardedTensorFactory) else entry
        values = [built] if isinstance(built, ShardedTensor) else list(nested_values(built))
        found += [value for value in values if isinstance(value, ShardedTensor)]
    return found
