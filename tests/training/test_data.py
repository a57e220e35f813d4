"""The default data set and the sample cache: real text, deterministic, and whole whoever builds them at once."""

import os
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from hp_plugin.training.arguments import parse_arguments
from hp_plugin.training.checks import check_config
from hp_plugin.training.corpus import build_corpus, standard_library_sources
from hp_plugin.training.data import build_datasets, parse_blend


def small_library(root: Path) -> list[Path]:
    for number in range(30):
        folder = root / f"package{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"module{number}.py").write_bytes(b"value = %d\n" % number * (number + 1) + bytes(range(256)))
    for ignored in ("test", "site-packages"):
        (root / ignored).mkdir()
        (root / ignored / "x.py").write_text("raise SystemExit\n")
    (root / "README.txt").write_text("not Python\n")
    return standard_library_sources(root)


def run_config(cache: Path, *more: str):
    flags = "--num-layers 1 --hidden-size 8 --num-attention-heads 1 --seq-length 16 --micro-batch-size 2 --lr 1"
    return parse_arguments([*flags.split(), "--train-iters", "6", "--data-cache-path", str(cache), *more])


def test_the_library_is_real_text_in_an_order_of_names_alone():
    sources = standard_library_sources()
    assert sources == standard_library_sources()
    assert sum(path.stat().st_size for path in sources) > 4_000_000
    names = {path.name for path in sources}
    assert {"argparse.py", "typing.py"} <= names
    assert not any({"site-packages", "test"} & set(path.parts[-3:-1]) for path in sources)


def test_documents_are_bytes_and_an_end_token(tmp_path):
    sources = small_library(tmp_path / "lib")
    assert len(sources) == 30
    prefix = build_corpus(tmp_path / "cache", sources)
    stored = IndexedDataset(prefix)
    assert len(stored) == 30
    for source, document in zip(sources, stored, strict=True):
        assert document.dtype == np.uint16
        assert document[-1] == 256 and bytes(document[:-1].astype(np.uint8)) == source.read_bytes()
    assert os.listdir(tmp_path / "cache") == [Path(prefix).parent.name]


def test_a_changed_library_is_another_data_set(tmp_path):
    sources = small_library(tmp_path / "lib")
    first = build_corpus(tmp_path / "cache", sources)
    assert build_corpus(tmp_path / "cache", sources) == first
    sources[0].write_text("something of another length\n")
    assert build_corpus(tmp_path / "cache", sources) != first


def test_no_source_is_said(tmp_path):
    with pytest.raises(ValueError, match="give --data-path or --mock-data"):
        build_corpus(tmp_path, [])


def test_an_interrupted_build_is_not_taken_for_a_data_set(tmp_path, monkeypatch):
    sources = small_library(tmp_path / "lib")
    with monkeypatch.context() as patched:
        reads = iter([sources[0].read_bytes(), KeyboardInterrupt()])

        def read(_path):
            value = next(reads)
            if isinstance(value, BaseException):
                raise value
            return value

        patched.setattr(Path, "read_bytes", read)
        with pytest.raises(KeyboardInterrupt):
            build_corpus(tmp_path / "cache", sources)
    assert os.listdir(tmp_path / "cache") == []
    assert len(IndexedDataset(build_corpus(tmp_path / "cache", sources))) == 30


def test_samples_come_from_the_documents_and_from_the_cache_alike(tmp_path):
    prefix = build_corpus(tmp_path / "cache", small_library(tmp_path / "lib"))
    config = run_config(tmp_path / "cache", "--data-path", prefix, "--split", "8,2,0", "--eval-interval", "3")
    train, valid, test = build_datasets(config, batch_size=4)
    assert len(train) >= 24 and len(valid) >= 3 * 100 * 4 and test is None
    text = b"".join(bytes(document[:-1].astype(np.uint8)) + b"\0" for document in IndexedDataset(prefix))
    sample = train[5]
    assert sorted(sample) == ["labels", "loss_mask", "position_ids", "tokens"]
    assert sample["tokens"][1:].tolist() == sample["labels"][:-1].tolist()
    if 256 not in sample["tokens"]:
        assert bytes(sample["tokens"].tolist()) in text
    again = build_datasets(config, batch_size=4)[0]
    assert [again[k]["tokens"].tolist() for k in range(24)] == [train[k]["tokens"].tolist() for k in range(24)]


def test_half_written_sample_indices_are_rebuilt(tmp_path, monkeypatch):
    prefix = build_corpus(tmp_path / "cache", small_library(tmp_path / "lib"))
    config = run_config(tmp_path / "cache", "--data-path", prefix)
    saved, save = [], np.save

    def interrupted(path, array, **options):
        saved.append(path)
        if len(saved) == 3:
            raise KeyboardInterrupt
        save(path, array, **options)

    with monkeypatch.context() as patched:
        patched.setattr("numpy.save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build_datasets(config, batch_size=4)
    assert len(saved) == 3
    (folder,) = (tmp_path / "cache" / "indices").iterdir()
    assert os.listdir(folder) == []
    assert len(build_datasets(config, batch_size=4)[0]) >= 24
    assert not [name for name in os.listdir(folder) if name.startswith("building")]


def test_a_split_without_documents_is_refused_where_it_would_be_read(tmp_path):
    prefix = build_corpus(tmp_path / "cache", small_library(tmp_path / "lib"))
    check_config(run_config(tmp_path, "--data-path", prefix), 1)
    with pytest.raises(ValueError, match=r"--split 969,30,1 leaves no test document among the 30 of .*bytes: change"):
        check_config(run_config(tmp_path, "--data-path", prefix, "--eval-interval", "3"), 1)


def test_mock_data_and_masks(tmp_path):
    train, _, _ = build_datasets(run_config(tmp_path, "--mock-data", "--reset-attention-mask"), batch_size=4)
    sample = train[0]
    assert sample["attention_mask"].shape == (1, 16, 16)
    assert os.listdir(tmp_path) == []


def test_blends():
    assert parse_blend(["a"]) == (["a"], None)
    assert parse_blend(["a", "b"]) == (["a", "b"], None)
    assert parse_blend(["0.3", "a", "7", "b"]) == (["a", "b"], [0.3, 7.0])
    with pytest.raises(ValueError, match=r"got 0\.3 a b"):
        parse_blend(["0.3", "a", "b"])
