"""Paths that cannot be written to are found before training, and asking leaves nothing behind."""

import errno
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from hp_plugin.training.arguments import parse_arguments
from hp_plugin.training.checks import check_config
from hp_plugin.training.writable import unwritable_file, unwritable_folder

FLAGS = "--num-layers 1 --hidden-size 8 --num-attention-heads 1 --seq-length 16 --micro-batch-size 2 --lr 1"
UNUSABLE = [  # name, what is said of it
    ("", "'' is empty: name a path, or leave the flag out"),
    ("  ", "is empty"),
    ("file/below", "file is a file: name another"),
    ("dangling", "which does not exist: make it, or name another"),
    ("dangling/below", "is a link to what does not exist"),
    ("x" * 300, "is too long, "),
    ("x/" * 2500, "is too long, "),
    ("a\0b", "null character"),
    ("/proc/self/new", "cannot be written to ("),
]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def listing(place: Path) -> list[str]:
    return sorted(str(path) for path in place.rglob("*"))


@pytest.mark.parametrize("option", ["save", "loss_file", "tensorboard_dir"])
@pytest.mark.parametrize(("name", "said"), [*UNUSABLE, ("wrong kind", "name a ")])
def test_an_unusable_path_is_refused_before_training(place: Path, option: str, name: str, said: str) -> None:
    if name == "wrong kind":
        name = "folder" if option == "loss_file" else "file"
    before = listing(place)
    config = replace(parse_arguments([*FLAGS.split(), "--train-iters", "1", "--mock-data"]), **{option: name})
    with pytest.raises(ValueError) as refusal:
        check_config(config, 1)
    told = str(refusal.value)
    assert told.startswith(f"--{option.replace('_', '-')} ") and said in told
    assert len(told) < 300 and "\n" not in told
    assert listing(place) == before


@pytest.mark.parametrize("name", ["folder", "folder/new", "new/er", "../new", "."])
def test_a_usable_folder_is_left_as_it_is(place: Path, name: str) -> None:
    before = listing(place)
    assert unwritable_folder(name) is None
    assert listing(place) == before


@pytest.mark.parametrize("name", ["file", "new", "folder/new", "new/er"])
def test_a_usable_file_is_left_as_it_is(place: Path, name: str) -> None:
    assert unwritable_file(name) is None
    assert (place / "file").read_text() == "kept"


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT])
def test_what_the_file_system_refuses_is_told(place: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    # Root may write to every folder of this machine, so the file system is played.
    def refuse(**_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    for said in (unwritable_folder("new"), unwritable_file("new")):
        assert said is not None and os.strerror(number) in said
