"""What can be wrong with the `.idx` and `.bin` of a data set, said before Megatron-Core maps them into memory.

Source of the layout: `megatron.core.datasets.indexed_dataset`, which asserts that the first bytes are right and takes
the rest as it comes.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import DType

_MAGIC, _HEADER = b"MMIDIDX\x00\x00", struct.Struct("<9sQBQQ")
_SCANNED = 2**24
"""Sequences that are looked at, and tokens compared with the vocabulary, before training; the others are when read."""
_WAY_OUT = "tokenize it again, or name another data set"


def data_complaint(prefix: str, vocabulary: int) -> str | None:
    """Which file of a data set is damaged or does not fit, and what to do; None if nothing is found.

    Args:
        vocabulary: the largest token, that of the end of a document.
    """
    index, tokens = Path(prefix + ".idx"), Path(prefix + ".bin")
    try:
        found = _wrong_with_index(index)
        if found is None:
            return _wrong_with_tokens(index, tokens, vocabulary)
    except OSError as error:
        return f"--data-path: {error.filename or index} cannot be read ({error.strerror}): see to it"
    return f"--data-path: {index} {found}: {_WAY_OUT}"


def _wrong_with_index(index: Path) -> str | None:
    size = index.stat().st_size
    with index.open("rb") as file:
        head = file.read(_HEADER.size)
    if not head:
        return "is empty"
    if head[: len(_MAGIC)] != _MAGIC[: len(head)]:
        return "is not the index of a data set"
    if len(head) < _HEADER.size:
        return f"is truncated to {size} bytes"
    _, version, code, sequences, documents = _HEADER.unpack(head)
    if version != 1:
        return f"is of version {version}, and Megatron-Core reads 1"
    if code not in {kind.value for kind in DType} or not np.issubdtype(DType.dtype_from_code(code), np.integer):
        return f"has the type {code} for tokens, which is no type of whole numbers"
    needed = _HEADER.size + 12 * sequences + 8 * documents
    if size < needed:
        return f"is truncated to {size} bytes, where {sequences} sequences and {documents} documents take {needed}"
    if not sequences or documents < 2:
        return "lists no document"
    return None


def _wrong_with_tokens(index: Path, tokens: Path, vocabulary: int) -> str | None:
    with index.open("rb") as file:
        _, _, code, sequences, documents = _HEADER.unpack(file.read(_HEADER.size))
    kind = DType.dtype_from_code(code)
    size = np.dtype(kind).itemsize
    # Of a very long index only the beginning and the end: every rank looks.
    seen = min(sequences, _SCANNED)
    lengths = np.memmap(index, np.int32, "r", _HEADER.size, (sequences,))
    starts = np.memmap(index, np.int64, "r", _HEADER.size + 4 * sequences, (sequences,))
    bounds = np.memmap(index, np.int64, "r", _HEADER.size + 12 * sequences, (documents,))
    expected = np.concatenate(([0], np.cumsum(lengths[: seen - 1], dtype=np.int64))) * size
    if lengths[:seen].min() < 0 or lengths[-1] < 0 or not np.array_equal(starts[:seen], expected):
        return f"--data-path: {index} is garbled, its sequences do not follow one another: {_WAY_OUT}"
    if bounds[0] != 0 or bounds[-1] != sequences or (np.diff(bounds[:_SCANNED]) < 0).any():
        return f"--data-path: {index} is garbled, its documents are not made of its sequences: {_WAY_OUT}"
    there, needed = tokens.stat().st_size, int(starts[-1]) + int(lengths[-1]) * size
    if there < needed:
        return f"--data-path: {tokens} is truncated to {there} bytes, where its index counts {needed}: {_WAY_OUT}"
    if not needed:
        return f"--data-path: {tokens} holds no token: {_WAY_OUT}"
    largest, smallest = _range(np.memmap(tokens, kind, "r", shape=(min(needed // size, _SCANNED),)))
    if largest > vocabulary or smallest < 0:
        return beyond(str(tokens), largest if largest > vocabulary else smallest, vocabulary)
    return None


def beyond(source: str, token: int, vocabulary: int) -> str:
    """What is said of a token that a model has no embedding for."""
    return (
        f"--data-path: {source} holds the token {token}, and tokens go up to {vocabulary - 1} with --vocab-size "
        f"{vocabulary}: give the vocabulary of its tokenizer, or another data set"
    )


def _range(tokens: np.ndarray) -> tuple[int, int]:
    return int(tokens.max()), int(tokens.min())
