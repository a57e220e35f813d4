"""Batches: Megatron's GPT data set over indexed files, split over data-parallel ranks the way Megatron does it."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.indexed_dataset import IndexedDataset
from torch.utils.data import DataLoader, Dataset

from hp_plugin.training.config import TrainingConfig
from hp_plugin.training.corpus import build_corpus
from hp_plugin.training.indexed_files import beyond
from hp_plugin.training.option_groups import BYTE_VOCABULARY

Batches = Iterator[dict[str, torch.Tensor]] | list[Iterator[dict[str, torch.Tensor]]]
"""What Megatron's schedules take: one iterator, or one for every model chunk of the interleaved schedule."""


class TokenError(ValueError):
    """A sample has a token that the model has no embedding for; the message names it and its data set."""


@dataclass(frozen=True)
class TokenIds:
    """The tokenizer that data sets of ready-made token ids need: sizes and the end-of-document token."""

    vocab_size: int
    eod: int

    @property
    def unique_identifiers(self) -> OrderedDict[str, Any]:
        """What Megatron's index cache tells tokenizers apart by."""
        return OrderedDict(class_=type(self).__name__, vocab_size=self.vocab_size, eod=self.eod)


class CachedGPTDataset(GPTDataset):
    """Stock GPTDataset whose cached sample indices appear complete or not at all.

    Source: `megatron.core.datasets.gpt_dataset.GPTDataset`, which takes whatever files it finds, so that a run that is
    killed while rank 0 writes them, or a second one started meanwhile, would leave later runs half an index.
    """

    def _build_document_sample_shuffle_indices(self) -> tuple[Any, Any, Any]:
        cache = Path(self.config.path_to_cache)
        stem = f"{self.unique_description_hash}-{type(self).__name__}-{self.index_split.name}"
        building = not dist.is_initialized() or dist.get_rank() == 0
        if not building or (cache / f"{stem}-description.txt").is_file():
            return super()._build_document_sample_shuffle_indices()
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="building-", dir=cache) as aside:
            self.config.path_to_cache = aside
            try:
                indices = super()._build_document_sample_shuffle_indices()
            finally:
                self.config.path_to_cache = str(cache)
            # The description comes last: it is what says that the others are there.
            for path in sorted(Path(aside).iterdir(), key=lambda path: path.suffix == ".txt"):
                os.replace(path, cache / path.name)
        return indices


def parse_blend(data_path: Sequence[str]) -> tuple[list[str], list[float] | None]:
    """Reads --data-path: prefixes alone, or a weight before each prefix.

    Raises:
        ValueError: some prefixes have weights and some have none.
    """

    def is_weight(word: str) -> bool:
        try:
            return float(word) >= 0
        except ValueError:
            return False

    if not any(is_weight(word) for word in data_path):
        return list(data_path), None
    weights, prefixes = data_path[::2], data_path[1::2]
    if len(data_path) % 2 or not all(map(is_weight, weights)) or any(map(is_weight, prefixes)):
        raise ValueError(f"--data-path takes prefixes alone or a weight before every prefix, got {' '.join(data_path)}")
    return list(prefixes), [float(weight) for weight in weights]


def cache_folder(config: TrainingConfig) -> Path:
    """Where built data sets and sample indices are kept."""
    return Path(config.data_cache_path) if config.data_cache_path else Path.home() / ".cache" / "hp_plugin"


def build_datasets(config: TrainingConfig, batch_size: int) -> list[GPTDataset | None]:
    """Train, validation and test set (None where there is nothing to evaluate); a collective call over the world.

    The order of samples depends on the seed and the number of samples alone, never on the layout.
    """
    evaluations = 0 if config.eval_interval is None else config.train_iters // config.eval_interval + 1
    samples = [
        config.train_iters * batch_size,
        evaluations * config.eval_iters * batch_size,
        config.eval_iters * batch_size,
    ]
    vocabulary = BYTE_VOCABULARY if config.vocab_size is None else config.vocab_size
    blend = None if config.mock_data else parse_blend(config.data_path or [_default_corpus(config)])
    settings = GPTDatasetConfig(
        random_seed=config.seed,
        sequence_length=config.seq_length,
        blend=blend,
        split=config.split,
        path_to_cache=None if blend is None else str(_index_folder(config, blend[0])),
        tokenizer=TokenIds(vocab_size=vocabulary + 1, eod=vocabulary),
        reset_position_ids=config.reset_position_ids,
        reset_attention_mask=config.reset_attention_mask,
        eod_mask_loss=config.eod_mask_loss,
        # Causal attention builds its own mask; one in the batch costs s² per sample.
        create_attention_mask=config.reset_attention_mask,
    )
    if not evaluations:
        settings.split_matrix = [settings.split_matrix[0], None, None]
    kind = MockGPTDataset if config.mock_data else CachedGPTDataset
    return BlendedMegatronDatasetBuilder(kind, samples, lambda: True, settings).build()


def batches(
    dataset: Dataset[dict[str, torch.Tensor]], config: TrainingConfig, iterations: int, batch_size: int, done: int = 0
) -> Batches:
    """Iterators over this data-parallel rank's micro-batches of `iterations` global batches, the first `done` left out.

    Micro-step k of an iteration takes the next b · DP samples, data-parallel rank r the r-th b of them; tensor- and
    pipeline-parallel ranks read the same ones. Tensors are [b, s] (`attention_mask`: [b, 1, s, s]).
    """
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    b, vocabulary = config.micro_batch_size, BYTE_VOCABULARY if config.vocab_size is None else config.vocab_size
    starts = range(done * batch_size + rank * b, iterations * batch_size, b * ranks)

    def read() -> Iterator[dict[str, torch.Tensor]]:
        plan = (range(start, start + b) for start in starts)
        # A generator of its own: a loader draws a number when it starts, which dropout's generator must not notice.
        loader = DataLoader(dataset, batch_sampler=plan, generator=torch.Generator())  # type: ignore[arg-type]
        return iter(loader) if config.data_path is None else _within(loader, config.data_path, vocabulary)

    return [read() for _ in range(config.virtual_pipeline)] if config.virtual_pipeline else read()


def _within(
    loader: Iterable[dict[str, torch.Tensor]], data_path: Sequence[str], vocabulary: int
) -> Iterator[dict[str, torch.Tensor]]:
    for batch in loader:
        largest = max(int(batch["tokens"].max()), int(batch["labels"].max()))
        if largest > vocabulary:  # an embedding would end in a device-side assertion
            raise TokenError(beyond(" ".join(data_path), largest, vocabulary))
        yield batch


def empty_split(config: TrainingConfig) -> str | None:
    """Says which split this run reads but --split leaves without a whole sample, or None.

    Megatron-Core would search forever for a document, and fails to order samples of which it has less than one.
    """
    if config.data_path is None:
        return None
    matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(config.split))
    names = ("train", "validation", "test")[: 1 if config.eval_interval is None else 3]
    for prefix in parse_blend(config.data_path)[0]:
        dataset = IndexedDataset(prefix)
        documents = len(dataset)
        for name, share in zip(names, matrix, strict=False):
            if share is None:
                continue
            first, last = (round(bound * documents) for bound in share)  # Megatron's own rounding
            if first == last:
                return f"--split {config.split} leaves no {name} document among the {documents} of {prefix}"
            tokens = int(dataset.sequence_lengths[first:last].sum(dtype="int64"))
            if tokens <= config.seq_length:
                return (
                    f"--split {config.split} leaves {tokens} {name} tokens of {prefix}, and one sample of --seq-length "
                    f"{config.seq_length} takes {config.seq_length + 1}: give a shorter --seq-length or more data"
                )
    return None


def _default_corpus(config: TrainingConfig) -> str:
    """The standard library as a data set: rank 0 builds it, then the others find it or, elsewhere, build theirs."""
    if dist.is_initialized() and dist.get_rank() != 0:
        dist.barrier()
        return build_corpus(cache_folder(config))
    prefix = build_corpus(cache_folder(config))
    if dist.is_initialized():
        dist.barrier()
    return prefix


def _index_folder(config: TrainingConfig, prefixes: Sequence[str]) -> Path:
    """A folder per state of the files: Megatron's own cache key holds only their path, not what is in them."""
    digest = hashlib.sha256()
    for prefix in prefixes:
        status = os.stat(prefix + ".idx")
        digest.update(f"{os.path.abspath(prefix)}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return cache_folder(config) / "indices" / digest.hexdigest()[:16]
