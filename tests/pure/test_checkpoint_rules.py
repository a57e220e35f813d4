"""Which grids may load which checkpoint, and the folder that never names an incomplete one."""

from argparse import Namespace
from pathlib import Path

import pytest

from hp_plugin.checkpoint.rules import (
    OVERRIDE_FLAG,
    check_same_function,
    check_same_layout,
    record_head_dim,
    recorded_head_dim,
)
from hp_plugin.config import HeadDimConfig

LOCAL_2X2 = HeadDimConfig(2, 2, "local")
HEAD_2X2 = HeadDimConfig(2, 2, order="head-innermost")


@pytest.mark.parametrize("head_dim", [None, HeadDimConfig(2, 4, "batch"), LOCAL_2X2, HEAD_2X2])
def test_what_is_recorded_is_read_back(head_dim: HeadDimConfig | None) -> None:
    arguments = Namespace()
    record_head_dim(arguments, head_dim)
    assert recorded_head_dim(arguments) == head_dim


def test_arguments_from_before_there_were_orders_are_dim_innermost() -> None:
    arguments = Namespace(head_dim_parallel="2,2", head_dim_exchange="batch")
    assert recorded_head_dim(arguments) == HeadDimConfig(2, 2, "batch", "dim-innermost")


def test_arguments_from_before_the_plugin_are_stock() -> None:
    assert recorded_head_dim(Namespace(num_layers=2)) is None


@pytest.mark.parametrize(
    ("saved", "own"),
    [
        (None, HeadDimConfig(2, 2)),
        (HeadDimConfig(1, 4, "scores"), None),
        (HeadDimConfig(1, 4, "scores"), HeadDimConfig(2, 2, "batch")),
        (LOCAL_2X2, HeadDimConfig(1, 2, "local")),
        (HeadDimConfig(4, 1, "local"), HeadDimConfig(2, 2)),
        (HEAD_2X2, HeadDimConfig(2, 2)),
        (LOCAL_2X2, HeadDimConfig(2, 2, "local", "head-innermost")),
    ],
)
def test_one_function_moves_between_all_its_layouts(saved: HeadDimConfig | None, own: HeadDimConfig | None) -> None:
    check_same_function(saved, own)
    check_same_function(own, saved)


@pytest.mark.parametrize("own", [None, HeadDimConfig(2, 2), HeadDimConfig(1, 4, "local"), HeadDimConfig(4, 1, "local")])
def test_local_slices_are_another_function_elsewhere(own: HeadDimConfig | None) -> None:
    for saved, loading in ((LOCAL_2X2, own), (own, LOCAL_2X2)):
        with pytest.raises(ValueError, match="another function") as refusal:
            check_same_function(saved, loading)
        assert OVERRIDE_FLAG in str(refusal.value)
        assert "--head-dim-parallel 2,2 --head-dim-exchange local" in str(refusal.value)
        check_same_function(saved, loading, override=True)


def test_a_ranks_own_bytes_stay_on_their_layout() -> None:
    check_same_layout("x", HeadDimConfig(1, 4), HeadDimConfig(1, 4, order="head-innermost"))
    with pytest.raises(ValueError, match=r"from --head-dim-parallel 2,2 .* has .* --head-dim-order head-innermost"):
        check_same_layout("x", HeadDimConfig(2, 2), HEAD_2X2)
    check_same_layout("x", HeadDimConfig(2, 2, "batch"), HeadDimConfig(2, 2, "scores"))
    check_same_layout("x", None, HeadDimConfig(4, 1))
    for own in (None, HeadDimConfig(1, 4), HeadDimConfig(4, 1)):
        with pytest.raises(ValueError, match="only on the layout that saved it"):
            check_same_layout("x", HeadDimConfig(2, 2), own)


def test_the_tracker_follows_complete_folders_only(tmp_path: Path) -> None:
    from hp_plugin.training.checkpoints.folder import TRACKER, CheckpointFolder

    folders = CheckpointFolder(tmp_path / "new")
    assert folders.latest() is None
    partial = folders.begin(5)
    (partial / "shard").write_text("five")
    assert folders.latest() is None
    folders.complete(partial, 5)
    assert folders.latest() == folders.of(5)
    leftover = folders.begin(4)
    partial = folders.begin(5)  # again, as a restarted run does; the first one stays loadable while the second grows
    assert (folders.of(5) / "shard").read_text() == "five"
    folders.of(5).rename(folders.of(5).with_name("iter_0000005.replaced"))  # a death between the two renames
    latest = folders.latest()
    assert latest is not None and (latest / "shard").read_text() == "five"
    (partial / "shard").write_text("five again")
    folders.complete(partial, 5)
    assert not leftover.exists()
    assert sorted(path.name for path in folders.path.iterdir()) == ["iter_0000005", TRACKER]
    assert (folders.of(5) / "shard").read_text() == "five again"


@pytest.mark.parametrize("word", ["", "five", "-1", "7"])
def test_a_tracker_that_leads_nowhere_is_refused(tmp_path: Path, word: str) -> None:
    from hp_plugin.training.checkpoints.folder import TRACKER, CheckpointFolder

    (tmp_path / TRACKER).write_text(word)
    with pytest.raises(ValueError, match=TRACKER):
        CheckpointFolder(tmp_path).latest()
