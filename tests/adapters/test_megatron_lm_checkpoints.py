"""What Megatron-LM saves and loads on a grid, by the hooks that it goes through: checksums, and files of one rank."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

from hp_plugin import cpu_backend
from hp_plugin.checkpoint.checks import WrongModelError
from hp_plugin.checkpoint.checksums import file_checksum, listed_checksums
from hp_plugin.config import HeadDimConfig
from hp_plugin.megatron_lm import saved_checksums
from hp_plugin.megatron_lm.argument_hooks import ArgumentHooks
from hp_plugin.megatron_lm.checkpoint_hooks import CheckpointHooks
from hp_plugin.upstream.checkpoint_format import own_queue
from tests.adapters.test_checkpoint_resume import writing_files
from tests.adapters.test_flags import STOCK, Hostile
from tests.ranks import Ranks

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*load_state_dict. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*we are deprecating ShardedTensor:FutureWarning"),
]
RANKS = 2
GRID = HeadDimConfig(1, 2)


def on_files(body: Callable[..., Any], *args: Any) -> Any:
    cpu_backend.enable()
    with writing_files():
        return body(*args)


def hooks(head_dim: HeadDimConfig | None = GRID) -> CheckpointHooks:
    stock = SimpleNamespace(_load_base_checkpoint=lambda load_dir, args, rank0=False: None)
    return CheckpointHooks(stock, lambda: head_dim)  # type: ignore[arg-type]


def state() -> dict[str, Any]:
    own = torch.arange(6.0) + 10 * dist.get_rank()
    return {"weight": ShardedTensor.from_rank_offsets("weight", own, (0, dist.get_rank(), RANKS)), "iteration": 3}


def saved(folder: Path, in_background: bool = False, head_dim: HeadDimConfig | None = GRID) -> bool:
    """Saves; whether Megatron-LM's tracker, which is written last, would have been written after the list."""
    if dist.get_rank() == 0:
        folder.mkdir(exist_ok=True)
    dist.barrier()
    how = own_queue() if in_background else {}
    request = hooks(head_dim).save(state(), str(folder), async_sharded_save=in_background, **how)
    there: list[bool] = []
    tracked = lambda: there.append((folder / "integrity.json").exists())  # noqa: E731
    if in_background:
        queue = AsyncCallsQueue()
        request.add_finalize_fn(tracked)
        queue.schedule_async_request(request)
        queue.maybe_finalize_async_calls(blocking=True)
        queue.close()
    else:
        tracked()
    dist.barrier()
    return there == [True] or dist.get_rank() > 0


def loaded(folder: Path, head_dim: HeadDimConfig | None = GRID) -> str:
    """What is said of a checkpoint on the first rank, by a refusal or beside its loading."""
    try:
        found = hooks(head_dim).load(state(), str(folder))
    except WrongModelError as refusal:
        return str(refusal)
    assert torch.equal(found["weight"], torch.arange(6.0) + 10 * dist.get_rank())
    return "loaded"


def flip(path: Path, place: int) -> None:
    """A bit, on the first rank, for all."""
    if dist.get_rank() == 0:
        content = bytearray(path.read_bytes())
        content[place] ^= 1
        path.write_bytes(content)
    dist.barrier()


def both_ways(path: str, in_background: bool) -> dict[str, Any]:
    folder = Path(path) / "iter_0000003"
    found: dict[str, Any] = {"in time": saved(folder, in_background), "whole": loaded(folder)}
    shard = max(folder.glob("__1_*"), key=lambda file: file.stat().st_size)
    flip(shard, -1)
    found["flipped"] = loaded(folder)
    flip(shard, -1)
    # The same folder again, with what an earlier run of more ranks left there.
    (folder / f"integrity_of_rank_{dist.get_rank()}.json").write_text("[]")
    (folder / "integrity_of_rank_7.json").write_text("[]")
    (folder / "__7_0.distcp").write_bytes(b"left")
    found |= {"again in time": saved(folder, in_background), "again": loaded(folder)}
    return found


@pytest.mark.parametrize("in_background", [False, True])
def test_what_a_grid_saves_is_known_again(ranks: Ranks, tmp_path: Path, in_background: bool) -> None:
    found = ranks.run(RANKS, on_files, both_ways, str(tmp_path), in_background)
    folder = tmp_path / "iter_0000003"
    for said in found:
        assert said["in time"] and said["again in time"]
        assert said["whole"] == "loaded" and said["again"] == "loaded"
        assert "has changed since it was written" in said["flipped"] and "/__1_" in said["flipped"]
    listed = listed_checksums(folder)
    expected = {path for path in os.listdir(folder) if path not in ("integrity.json", "__7_0.distcp")}
    assert set(listed) == expected and {".metadata", "metadata.json"} < expected
    assert all(file_checksum(folder / name) == digest for name, digest in listed.items())


def without(path: str) -> list[str]:
    said = []
    for name, head_dim in (("stock", None), ("grid", GRID)):
        saved(Path(path) / name, head_dim=head_dim)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert loaded(Path(path) / name) == "loaded"
        said.append(out.getvalue())
    return said


def test_a_checkpoint_without_is_loaded_with_a_word(ranks: Ranks, tmp_path: Path) -> None:
    first, *others = ranks.run(RANKS, on_files, without, str(tmp_path))
    assert f"checkpoint {tmp_path}/stock has no checksums (integrity.json)" in first[0] and first[0].count("\n") == 1
    assert first[1] == "" and others == [["", ""]] * (RANKS - 1)
    assert not (tmp_path / "stock" / "integrity.json").exists()


def no_room(path: str) -> list[bool]:

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    kept, saved_checksums.write_shard_checksums = saved_checksums.write_shard_checksums, full
    try:
        saved(Path(path) / "grid")
    finally:
        saved_checksums.write_shard_checksums = kept
    return [loaded(Path(path) / "grid") == "loaded", (Path(path) / "grid" / "integrity.json").exists()]


def test_no_room_for_a_list_is_no_reason_to_lose_a_checkpoint(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks.run(RANKS, on_files, no_room, str(tmp_path)) == [[True, False]] * RANKS


def test_a_file_of_a_rank_whose_reading_would_run_code_ends_the_program(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "iter_0000002" / "mp_rank_00" / "model_optim_rng.pt"
    path.parent.mkdir(parents=True)
    torch.save({"payload": Hostile(tmp_path / "made")}, path)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("2")
    arguments = ModuleType("arguments")
    arguments.add_megatron_arguments = lambda parser: parser  # type: ignore[attr-defined]
    arguments.validate_args = lambda args, defaults=None: "validated"  # type: ignore[attr-defined]
    hooked = ArgumentHooks(arguments, ["--head-dim-parallel", "2,2"])
    given = STOCK | {"head_dim_parallel": "2,2", "load": str(tmp_path), "rank": 0, "world_size": 4}
    with pytest.raises(SystemExit) as end:
        hooked.validate(argparse.Namespace(**given))
    assert end.value.code == 2
    assert f"error: checkpoint file {path} names os.makedirs" in (said := capsys.readouterr().err)
    assert "--trust-checkpoint" in said and not (tmp_path / "made").exists()
    assert hooked.validate(argparse.Namespace(**given, trust_checkpoint=True)) == "validated"
    # Where arguments come from the checkpoint, it is read before they are validated.
    stock = SimpleNamespace(_load_base_checkpoint=lambda load_dir, args, rank0=False: (None, "", False, None))
    with pytest.raises(SystemExit):
        CheckpointHooks(stock, lambda: None).read(str(tmp_path), argparse.Namespace(**given), rank0=True)  # type: ignore[arg-type]
    assert "names os.makedirs" in capsys.readouterr().err
