"""The data set every machine has: the source of Python's standard library, as bytes in Megatron's indexed format."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from hp_plugin.training.option_groups import BYTE_VOCABULARY

_FORMAT = "1"
_LEFT_OUT = frozenset({"__pycache__", "dist-packages", "site-packages", "test", "tests", "idle_test"})


def standard_library_sources(root: Path | None = None) -> list[Path]:
    """The modules of the standard library, in an order that depends on their names alone.

    Sorted by a hash of the relative path: neighbouring modules are about the same thing, and the split into training
    and validation documents is a cut through this order. Tests are left out, as not every installation has them.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    found: list[tuple[bytes, Path]] = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _LEFT_OUT]
        for name in files:
            if name.endswith(".py"):
                path = Path(folder, name)
                key = hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()
                found.append((key, path))
    return [path for _, path in sorted(found)]


def build_corpus(cache: Path, sources: list[Path] | None = None) -> str:
    """Builds the data set in `cache` unless it is there; returns its prefix, as --data-path takes it.

    One document per module: its bytes, then the end-of-document token 256, as uint16. Safe to call from any number of
    processes at once and after an interrupted build: the files are written aside and appear under their name complete.

    Raises:
        ValueError: there is no Python source to build from.
    """
    sources = standard_library_sources() if sources is None else sources
    if not sources:
        raise ValueError(
            f"no standard-library source under {sysconfig.get_paths()['stdlib']}: give --data-path or --mock-data"
        )
    home = cache / f"python-{sys.version_info.major}.{sys.version_info.minor}-{_fingerprint(sources)}"
    prefix = str(home / "bytes")
    if home.is_dir():
        return prefix
    cache.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix="building-", dir=cache))
    try:
        builder = IndexedDatasetBuilder(str(aside / "bytes.bin"), dtype=np.uint16)
        with builder.data_file:
            for source in sources:
                tokens = np.frombuffer(source.read_bytes(), dtype=np.uint8).astype(np.uint16)
                builder.add_document(np.append(tokens, np.uint16(BYTE_VOCABULARY)), [len(tokens) + 1])
        builder.finalize(str(aside / "bytes.idx"))
        aside.chmod(0o755)  # mkdtemp's own mode would shut out others who share the cache
        try:
            aside.rename(home)
        except OSError:
            if not home.is_dir():
                raise
            # Another process was first; its files hold the same bytes.
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return prefix


def _fingerprint(sources: list[Path]) -> str:
    """Names this set of files without reading them: another Python release or patch level is another data set."""
    digest = hashlib.sha256(_FORMAT.encode())
    for source in sources:
        digest.update(f"{source}\0{source.stat().st_size}\n".encode())
    return digest.hexdigest()[:16]
