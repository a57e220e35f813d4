"""Files of `--ckpt-format torch` before they are loaded: their bytes, and what reading them would run."""

import argparse
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hp_plugin.checkpoint.rank_files import check_rank_files
from hp_plugin.checkpoint.reading import DamagedFileError
from hp_plugin.megatron_lm.rank_files import check_files_to_load
from tests.training.test_damaged_files import (
    DAMAGES,
    Hostile,
    changed,
    dangling,
    emptied,
    one_line,
    removed,
    unreadable,
)

NAMES = ("mp_rank_00/model_optim_rng.pt", "mp_rank_01/distrib_optim.pt", "mp_rank_01/model_optim_rng.pt")


def saved(path: Path, **more: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {"weight": torch.arange(1000.0), "bias": torch.zeros(0)}
    torch.save({"model": weights, "args": argparse.Namespace(num_layers=2), "iteration": 5, **more}, path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of two ranks, the second with an optimizer's state of its own."""
    torch.serialization.add_safe_globals([argparse.Namespace])  # as Megatron-Core does when it is imported
    for name in NAMES:
        saved(tmp_path / "iter_0000005" / name)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("5")
    return tmp_path / "iter_0000005"


def said(folder: Path, rank: int = 0, ranks: int = 1, trusted: bool = False) -> str:
    check_rank_files.cache_clear()
    try:
        check_rank_files(folder, rank, ranks, trusted)
    except DamagedFileError as damage:
        return str(damage)
    return ""


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", [damage for damage in DAMAGES if damage is not removed])
def test_a_damaged_file_is_told(folder: Path, name: str, damage: Callable[[Path], None]) -> None:
    assert said(folder) == ""
    damage(folder / name)
    assert one_line(said(folder), folder / name)
    # torch once wrote other files than zip: if trusted, those are left to it.
    assert one_line(said(folder, trusted=True), folder / name) or damage not in (emptied, unreadable, dangling)


def test_every_file_is_read_by_one_rank(folder: Path) -> None:
    for name in NAMES:
        dangling(folder / name)
    found = [said(folder, rank, 4) for rank in range(4)]
    assert [one_line(words, folder / name) for words, name in zip(found, sorted(NAMES), strict=False)] == [True] * 3
    assert found[3] == ""


def test_every_changed_bit_of_a_tensor_is_told(folder: Path) -> None:
    path, chance = folder / NAMES[0], random.Random(1)
    kept = path.read_bytes()
    first = kept.index(torch.arange(1000.0).numpy().tobytes())
    for _ in range(50):
        content = bytearray(kept)
        content[first + chance.randrange(4000)] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        for trusted in (False, True):
            assert "has changed since it was written (in " in said(folder, trusted=trusted)
    for _ in range(100):
        path.write_bytes(changed(kept, chance))
        words = said(folder)
        assert words == "" or one_line(words, path)


@pytest.mark.parametrize("zipped", [True, False])
def test_reading_runs_nothing_and_trust_leaves_the_reading_to_others(folder: Path, zipped: bool) -> None:
    made, path = folder / "made", folder / NAMES[2]
    torch.save({"payload": Hostile(made)}, path, _use_new_zipfile_serialization=zipped)
    words = said(folder)
    assert one_line(words, path) and not made.exists()
    if zipped:
        assert "mkdir" in words and "--trust-checkpoint" in words
    assert said(folder, trusted=True) == "" and not made.exists()


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"load": "nowhere", "pretrained_checkpoint": "here"},
        {"ckpt_step": 5, "tracker": "7"},
        {"tracker": "release", "named": "release"},
        {"load": "here", "pretrained_checkpoint": "nowhere"},
    ],
)
def test_the_checkpoint_that_megatron_lm_will_load_is_looked_through(folder: Path, more: dict[str, str]) -> None:
    places = {"here": str(folder.parent), "nowhere": str(folder.parent / "nowhere")}
    (folder.parent / "latest_checkpointed_iteration.txt").write_text(more.pop("tracker", "5"))
    folder = folder.rename(folder.parent / more.pop("named", folder.name))
    torch.save({"payload": Hostile(folder / "made")}, folder / NAMES[1])
    flags = {"load": "here", "rank": 1, "world_size": 2} | more
    args = argparse.Namespace(**{name: places.get(str(value), value) for name, value in flags.items()})
    with pytest.raises(DamagedFileError, match="distrib_optim"):
        check_files_to_load(args)
    args.rank = 0
    check_files_to_load(args)


@pytest.mark.parametrize("tracker", ["", "garbage", None, "9"])
def test_what_is_not_there_is_left_to_megatron_lm(folder: Path, tracker: str | None) -> None:
    path = folder.parent / "latest_checkpointed_iteration.txt"
    path.unlink()
    if tracker is not None:
        path.write_text(tracker)
    for load in (str(folder.parent), None, "msc://bucket/there"):
        check_files_to_load(argparse.Namespace(load=load, rank=0, world_size=1))
    assert os.listdir(folder)
