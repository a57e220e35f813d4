"""Damaged files of checkpoints and data sets, every kind of damage to each: one line, with the file and a way out."""

import hashlib
import importlib
import io
import json
import os
import pickle
import random
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from hp_plugin.checkpoint import checks
from hp_plugin.checkpoint.checks import check_files, read_common_state
from hp_plugin.checkpoint.checksums import (
    complete_checksums,
    listed_checksums,
    verify_checksum,
    write_shard_checksums,
)
from hp_plugin.checkpoint.reading import DamagedFileError, read_torch_file
from hp_plugin.training.arguments import parse_arguments
from hp_plugin.training.checkpoints.folder import TRACKER, CheckpointFolder
from hp_plugin.training.checks import check_config
from hp_plugin.training.data import TokenError, batches
from hp_plugin.training.indexed_files import data_complaint

pytestmark = [
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning"),
]


class Hostile:
    """Makes a directory when it is unpickled."""

    def __init__(self, made: Path) -> None:
        self.made = str(made)

    def __reduce__(self):
        return os.mkdir, (self.made,)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def halved(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garbled(path: Path) -> None:
    path.write_bytes(bytes(np.random.default_rng(1).integers(0, 256, path.stat().st_size, np.uint8)))


def nothing_but_zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def text(path: Path) -> None:
    path.write_text("<html>404 Not Found</html>\n" * 40)


def removed(path: Path) -> None:
    path.unlink()


def unreadable(path: Path) -> None:
    # To root every mode is readable; a folder is to nobody.
    path.unlink()
    path.mkdir()


def dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.parent / "nowhere")


DAMAGES = [emptied, halved, garbled, nothing_but_zeros, text, removed, unreadable, dangling]


def one_line(said: str, file: Path) -> bool:
    return str(file) in said and "\n" not in said and len(said) - len(str(file)) < 250 and ": " in said


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """What `torch_dist` consists of, written by torch itself."""
    folder = tmp_path / "iter_0000001"
    dcp.save({"weight": torch.arange(12.0), "rng_state": [1, 2, 3]}, checkpoint_id=folder, no_dist=True)
    torch.save({"iteration": 1, "args": None}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [".metadata", "common.pt", "metadata.json", "__0_0.distcp"])
def test_a_damaged_checkpoint_is_told_by_its_file(checkpoint: Path, name: str, damage: Callable[[Path], None]) -> None:
    check_files(checkpoint)
    write_shard_checksums(checkpoint, 0)
    complete_checksums(checkpoint, 1)
    sums = listed_checksums(checkpoint)
    damage(checkpoint / name)
    with pytest.raises(DamagedFileError) as told:
        check_files(checkpoint)
        for file, expected in sums.items():  # what has its size and form still
            verify_checksum(checkpoint / file, expected)
    assert one_line(str(told.value), checkpoint / name)
    assert pickle.loads(pickle.dumps(told.value)).args == told.value.args


@pytest.mark.parametrize("damage", [emptied, halved, garbled, text, unreadable, dangling])
def test_so_is_a_list_of_checksums(checkpoint: Path, damage: Callable[[Path], None]) -> None:
    write_shard_checksums(checkpoint, 0)
    complete_checksums(checkpoint, 1)
    assert set(listed_checksums(checkpoint)) == {".metadata", "common.pt", "metadata.json", "__0_0.distcp"}
    damage(checkpoint / "integrity.json")
    with pytest.raises(DamagedFileError) as told:
        listed_checksums(checkpoint)
    assert one_line(str(told.value), checkpoint / "integrity.json")


def test_the_list_of_checksums_is_that_of_megatron_core(checkpoint: Path) -> None:
    write_shard_checksums(checkpoint, 0)
    complete_checksums(checkpoint, 1)
    own = json.loads((checkpoint / "integrity.json").read_text())
    by_hand = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in checkpoint.iterdir()
        if file.name != "integrity.json"
    }
    assert own == {"algorithm": "sha256", "files": by_hand}
    validation = importlib.import_module("megatron.core.dist_checkpointing.validation")
    if not hasattr(validation, "save_integrity_manifest"):
        pytest.skip("Megatron-Core has one from 0.19 on")
    validation.verify_integrity_manifest(str(checkpoint))
    validation.save_integrity_manifest(str(checkpoint))
    assert listed_checksums(checkpoint) == by_hand


def test_a_shard_that_its_writer_did_not_finish_completes_nothing(checkpoint: Path) -> None:
    write_shard_checksums(checkpoint, 0)
    (checkpoint / "__1_0.distcp").write_bytes(b"half of it")
    with pytest.raises(RuntimeError, match=r"__1_0\.distcp has no checksum"):
        complete_checksums(checkpoint, 2)
    assert not (checkpoint / "integrity.json").exists()


def test_what_an_earlier_save_of_more_ranks_has_left_is_no_part_of_a_checkpoint(checkpoint: Path) -> None:
    for rank in (0, 7):
        write_shard_checksums(checkpoint, rank)
    (checkpoint / "__7_0.distcp").write_bytes(b"left")
    complete_checksums(checkpoint, 2)
    assert "__7_0.distcp" not in listed_checksums(checkpoint)
    assert not list(checkpoint.glob("integrity_of_rank_*"))


@pytest.mark.parametrize("content", [[], {}, "text", 3, None, {"weight": 1}])
def test_other_types_are_told(checkpoint: Path, content: object) -> None:
    for name, write in (
        (".metadata", lambda path: path.write_bytes(pickle.dumps(content))),
        ("metadata.json", lambda path: path.write_text(json.dumps(content))),
        ("common.pt", lambda path: torch.save(content, path)),
    ):
        kept = (checkpoint / name).read_bytes()
        write(checkpoint / name)
        if name == "common.pt" and isinstance(content, dict):
            check_files(checkpoint)
        else:
            with pytest.raises(DamagedFileError) as told:
                check_files(checkpoint)
            assert one_line(str(told.value), checkpoint / name)
        (checkpoint / name).write_bytes(kept)


def test_an_index_that_points_elsewhere_is_told(checkpoint: Path) -> None:
    index = pickle.loads((checkpoint / ".metadata").read_bytes())
    place = next(iter(index.storage_data.values()))
    for wrong in ({"relative_path": "../../etc/passwd"}, {"relative_path": 3}, {"offset": -1}, {"length": "much"}):
        kept = dict(vars(place))
        vars(place).update(wrong)
        (checkpoint / ".metadata").write_bytes(pickle.dumps(index))
        with pytest.raises(DamagedFileError, match="is no index of a checkpoint: a piece"):
            check_files(checkpoint)
        vars(place).update(kept)


def test_the_arguments_are_a_namespace(checkpoint: Path) -> None:
    torch.save({"args": {"num_layers": 2}}, checkpoint / "common.pt")
    with pytest.raises(DamagedFileError, match=r"common\.pt holds no arguments"):
        read_common_state(checkpoint)


@pytest.mark.parametrize("name", [".metadata", "common.pt"])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_reading_runs_nothing_unless_the_folder_is_trusted(checkpoint: Path, name: str, protocol: int) -> None:
    made, path = checkpoint / "made", checkpoint / name
    if name == "common.pt":
        torch.save({"payload": Hostile(made)}, path, pickle_protocol=protocol)
    else:
        index = pickle.loads(path.read_bytes())
        index.planner_data = Hostile(made)
        path.write_bytes(pickle.dumps(index, protocol))
    with pytest.raises(DamagedFileError) as told:
        check_files(checkpoint)
    assert one_line(str(told.value), path) and not made.exists()
    assert "--trust-checkpoint" in str(told.value)
    # torch writes protocol 2, and in the first two its own records are made by what anything is.
    assert "mkdir" in str(told.value) or (name == "common.pt" and protocol != 2) or protocol < 2
    check_files(checkpoint, trusted=True)
    assert made.exists()


@pytest.mark.parametrize("within", [False, True])
def test_nor_does_a_common_state_among_the_shards(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, within: bool
) -> None:
    """As Megatron-Core 0.19 keeps it, which has torch unpickle it: as it is, or the bytes of what was saved."""
    monkeypatch.setattr(checks, "reads_sharded_common_state", lambda: True)
    (checkpoint / "common.pt").unlink()
    shard, made = checkpoint / "__0_1.distcp", checkpoint / "made"
    for payload in ({"iteration": 3}, {"iteration": Hostile(made)}, "text", []):
        if within:
            inner = io.BytesIO()
            torch.save([payload], inner)
            torch.save(inner, shard)
        else:
            torch.save([payload], shard)
        index = pickle.loads((checkpoint / ".metadata").read_bytes())
        index.state_dict_metadata["common_state/shard_0_1"] = BytesStorageMetadata()
        place = _StorageInfo(shard.name, 0, shard.stat().st_size)
        index.storage_data[MetadataIndex("common_state/shard_0_1")] = place
        (checkpoint / ".metadata").write_bytes(pickle.dumps(index))
        if payload == {"iteration": 3}:
            check_files(checkpoint)
            assert read_common_state(checkpoint) == payload
            continue
        with pytest.raises(DamagedFileError) as told:
            check_files(checkpoint)
        assert one_line(str(told.value), shard) and not made.exists()
    shard.write_bytes(bytes(place.length))
    with pytest.raises(DamagedFileError, match=r"__0_1\.distcp is garbled"):
        check_files(checkpoint)


@pytest.mark.parametrize(
    "named", ["os system", "builtins eval", "torch.distributed.checkpoint.filesystem os.system", "torch load"]
)
def test_an_index_has_torchs_own_records_alone(checkpoint: Path, named: str) -> None:
    module, name = named.split()
    payload = b"\x80\x04" + pickle.SHORT_BINUNICODE + bytes([len(module)]) + module.encode()
    payload += pickle.SHORT_BINUNICODE + bytes([len(name)]) + name.encode() + b"\x93."
    (checkpoint / ".metadata").write_bytes(payload)
    with pytest.raises(DamagedFileError, match="no checkpoint needs"):
        check_files(checkpoint)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_of_one_rank_is_told(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    path = tmp_path / "model_optim_rng.pt"
    torch.save({"model": {"weight": torch.ones(100)}, "args": None}, path)
    assert list(read_torch_file(path)) == ["model", "args"]
    damage(path)
    with pytest.raises(DamagedFileError) as told:
        read_torch_file(path)
    assert one_line(str(told.value), path)


@pytest.mark.parametrize("word", ["", "  \n", "latest", "-3", "1.5", "٣", "9" * 5000, "\x00", "release", "12"])
def test_a_damaged_tracker_is_told(tmp_path: Path, word: str) -> None:
    (tmp_path / TRACKER).write_text(word)
    with pytest.raises(DamagedFileError) as told:
        CheckpointFolder(tmp_path).latest()
    assert one_line(str(told.value), tmp_path / TRACKER)


@pytest.mark.parametrize("damage", [emptied, garbled, nothing_but_zeros, text, unreadable, dangling])
def test_so_is_one_that_is_no_text(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    (tmp_path / TRACKER).write_text("1000000")
    damage(tmp_path / TRACKER)
    with pytest.raises(DamagedFileError) as told:
        CheckpointFolder(tmp_path).latest()
    assert one_line(str(told.value), tmp_path / TRACKER)


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Forty documents of twenty tokens below 60, and the end."""
    prefix = str(tmp_path / "data")
    builder = IndexedDatasetBuilder(prefix + ".bin", np.uint16)
    for number in range(40):
        builder.add_document([number, *range(20), 60], [22])
    builder.finalize(prefix + ".idx")
    return prefix


def flags(data: str, more: str = "") -> list[str]:
    model = "--num-layers 1 --hidden-size 8 --num-attention-heads 1 --seq-length 16 --micro-batch-size 2 --lr 1"
    return f"{model} --train-iters 6 --data-path {data} --vocab-size 60 {more}".split()


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("ending", [".idx", ".bin"])
def test_a_damaged_data_set_is_told_by_its_file(data: str, ending: str, damage: Callable[[Path], None]) -> None:
    assert data_complaint(data, 60) is None
    check_config(parse_arguments(flags(data)), 1)
    path = Path(data + ending)
    if ending == ".bin" and damage is nothing_but_zeros:
        pytest.skip("zeros are tokens")
    if ending == ".bin" and damage is text:
        path.write_text("x" * 10_000)
    else:
        damage(path)
    with pytest.raises(ValueError) as told:
        check_config(parse_arguments(flags(data)), 1)
    assert one_line(str(told.value), path)


@pytest.mark.parametrize(
    ("offset", "value", "said"),
    [
        (9, struct.pack("<Q", 2), "is of version 2"),
        (17, b"\x07", "no type of whole numbers"),
        (17, b"\x63", "no type of whole numbers"),
        (18, struct.pack("<Q", 2**60), "is truncated"),
        (18, struct.pack("<Q", 0), "lists no document"),
        (34, struct.pack("<i", -5), "do not follow one another"),
        (34 + 4 * 40 + 8, struct.pack("<q", 10**15), "do not follow one another"),
        (34 + 12 * 40 + 8 * 40, struct.pack("<q", 3), "documents are not made of its sequences"),
    ],
)
def test_an_index_of_wrong_numbers_is_told(data: str, offset: int, value: bytes, said: str) -> None:
    path = Path(data + ".idx")
    content = bytearray(path.read_bytes())
    content[offset : offset + len(value)] = value
    path.write_bytes(content)
    assert said in str(data_complaint(data, 60)) and one_line(str(data_complaint(data, 60)), path)


def test_tokens_beyond_the_vocabulary_are_told_before_training(data: str) -> None:
    with pytest.raises(ValueError, match=r"data\.bin holds the token 60, and tokens go up to 49 with --vocab-size 50"):
        check_config(parse_arguments(flags(data, "--vocab-size 50")), 1)


def test_those_that_come_late_are_told_when_they_are_read(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.core.parallel_state.get_data_parallel_rank", lambda: 0)
    monkeypatch.setattr("megatron.core.parallel_state.get_data_parallel_world_size", lambda: 1)
    samples = [{"tokens": torch.full((16,), k), "labels": torch.full((16,), k + 1)} for k in range(49, 61)]
    read = batches(samples, parse_arguments(flags(data)), 6, 2)
    with pytest.raises(TokenError, match=f"{data} holds the token 61, and tokens go up to 59 with --vocab-size 60"):
        for _ in range(6):
            next(read)


def test_less_than_a_sample_is_told(data: str) -> None:
    # By hand: 40 documents of 22 tokens; one of them is the validation split.
    for more, said in (
        ("--seq-length 880", r"leaves 858 train tokens of .*data, and one sample of --seq-length 880 takes 881"),
        ("--seq-length 22 --eval-interval 1", r"leaves 22 validation tokens of .*data, and one sample"),
    ):
        with pytest.raises(ValueError, match=said):
            check_config(
                parse_arguments(
                    flags(data, f"{more} --split 39,1,0" if "eval" not in more else f"{more} --split 38,1,1")
                ),
                1,
            )


def changed(content: bytes, chance: random.Random) -> bytes:
    """With bits flipped, cut off, something put in or something left out."""
    place, found = chance.randrange(len(content)), bytearray(content)
    how = chance.randrange(4)
    if how == 0:
        found[place] ^= 1 << chance.randrange(8)
    elif how == 1:
        del found[place:]
    elif how == 2:
        found[place:place] = chance.randbytes(chance.randrange(1, 20))
    else:
        del found[place : place + chance.randrange(1, 50)]
    return bytes(found)


@pytest.mark.parametrize("name", [".metadata", "common.pt", "metadata.json", "data.idx", "data.bin"])
def test_whatever_is_changed_is_told_in_a_line_or_does_no_harm(checkpoint: Path, data: str, name: str) -> None:
    chance, told = random.Random(name), 0
    path = Path(data).parent / name if name.startswith("data") else checkpoint / name
    kept = path.read_bytes()
    for _ in range(100):
        path.write_bytes(changed(kept, chance))
        try:
            check_files(checkpoint)
            complaint = data_complaint(data, 60)
        except DamagedFileError as damage:
            complaint = str(damage)
        if complaint is not None:
            told += 1
            assert one_line(complaint, path)
    assert told > 60
