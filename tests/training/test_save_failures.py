"""A save that fails says why in one line, whoever of torch, Megatron-Core and the system says it first."""

import errno
import os
import pickle
from collections import namedtuple
from pathlib import Path

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from hp_plugin.checkpoint.checks import WrongModelError
from hp_plugin.training.checkpoints import failures
from hp_plugin.training.checkpoints.failures import NotSavedError, loading, saving

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/somewhere/__0_0.distcp")
TORCH = RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 704 vs 640\nframe #0: somewhere")


def told(folder: Path, error: BaseException) -> str:
    with pytest.raises(NotSavedError) as failure, saving(folder):
        raise error
    said = str(failure.value)
    assert "\n" not in said and str(folder) in said and said.endswith("earlier checkpoints there are complete")
    return said


def chained() -> RuntimeError:
    try:
        try:
            raise FULL
        except OSError as error:
            raise RuntimeError("Worker failed") from error
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    "error",
    [
        FULL,
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        chained(),
        CheckpointException("write", {0: (FULL, None), 3: (ValueError("no"), None)}),  # type: ignore[dict-item]
    ],
)
def test_a_full_disk_says_that_it_is_full(tmp_path: Path, error: BaseException) -> None:
    said = told(tmp_path / "not" / "yet", error)
    assert "the disk is full, " in said and "make room, or save elsewhere" in said


@pytest.mark.parametrize("free", [0, 2**40])
def test_where_torch_does_not_say_why_the_free_bytes_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(failures.shutil, "disk_usage", lambda _: usage(2**40, 0, free))
    said = told(tmp_path, TORCH)
    assert ("the disk is full, 0 bytes are free" in said) == (free == 0)
    assert ("frame #0" in said or "unexpected pos" in said) == (free > 0)


def test_other_errors_keep_their_file(tmp_path: Path) -> None:
    said = told(tmp_path, PermissionError(errno.EACCES, os.strerror(errno.EACCES), f"{tmp_path}/x"))
    assert f"Permission denied ({tmp_path}/x)" in said


def test_a_shard_that_cannot_be_read_is_told_with_its_checkpoint(tmp_path: Path) -> None:
    error = CheckpointException("read", {1: (pickle.UnpicklingError("bad"), None)})  # type: ignore[dict-item]
    with (
        pytest.raises(WrongModelError, match=rf"a shard of checkpoint {tmp_path} cannot be read \(.*bad\): restore it"),
        loading(tmp_path),
    ):
        raise error
