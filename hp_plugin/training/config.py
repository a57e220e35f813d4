"""One run's options together, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hp_plugin.config import WIDEST, HeadDimConfig
from hp_plugin.training.option_groups import (
    BYTE_VOCABULARY,
    CheckpointOptions,
    DataOptions,
    DistributedOptions,
    LearningRateOptions,
    MixtureOptions,
    NetworkOptions,
    PrecisionOptions,
    RegularizationOptions,
    ReportOptions,
    TrainingOptions,
)
from hp_plugin.training.options import check_names, settled_values


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(
    NetworkOptions,
    RegularizationOptions,
    TrainingOptions,
    LearningRateOptions,
    PrecisionOptions,
    DistributedOptions,
    MixtureOptions,
    DataOptions,
    ReportOptions,
    CheckpointOptions,
):
    """All options of one run; `checks.check_config` says whether they fit a world.

    Raises:
        ValueError: an option is of another type than its own, or not what its definition says that it may be.
    """

    def __post_init__(self) -> None:
        for name, value in settled_values(self).items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> TrainingConfig:
        """A configuration from options by their names, as JSON files have them.

        Raises:
            ValueError: a name is unknown or missing, or see above.
        """
        check_names(cls, options)
        return cls(**options)

    @property
    def query_groups(self) -> int:
        """Key/value heads g."""
        if self.num_query_groups is not None:
            return self.num_query_groups
        return 1 if self.group_query_attention else self.num_attention_heads

    @property
    def padded_vocab_size(self) -> int:
        """Vocabulary with end-of-document, padded by --make-vocab-size-divisible-by alone: equal on all layouts."""
        tokens = (BYTE_VOCABULARY if self.vocab_size is None else self.vocab_size) + 1
        return -(-tokens // self.make_vocab_size_divisible_by) * self.make_vocab_size_divisible_by

    @property
    def head_dim(self) -> HeadDimConfig | None:
        """The attention grid, or None for a stock run.

        Raises:
            ValueError: no valid m,n, or it contradicts --tensor-model-parallel-size.
        """
        if self.head_dim_parallel is None:
            return None
        given = self.tensor_model_parallel_size
        if self.head_dim_parallel == WIDEST:
            if given is None:
                raise ValueError("--head-dim-parallel auto needs --tensor-model-parallel-size, whose m·n it picks")
            return HeadDimConfig.widest(given, self.query_groups, self.head_dim_exchange, self.head_dim_order)
        head_dim = HeadDimConfig.parse(self.head_dim_parallel, self.head_dim_exchange, self.head_dim_order)
        head_dim.check_tensor_parallel_size(given)
        return head_dim

    @property
    def tensor_parallel(self) -> int:
        """Tensor-parallel ranks P."""
        head_dim = self.head_dim
        return head_dim.size if head_dim is not None else self.tensor_model_parallel_size or 1

    @property
    def model_parallel(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tensor_parallel * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def virtual_pipeline(self) -> int | None:
        """Model chunks per rank of the interleaved schedule, or None."""
        per_chunk = self.num_layers_per_virtual_pipeline_stage
        return None if per_chunk is None else self.num_layers // self.pipeline_model_parallel_size // per_chunk

    def batch_size(self, world_size: int) -> int:
        """Sequences per iteration over the whole world."""
        return self.global_batch_size or self.micro_batch_size * (world_size // self.model_parallel)

    def micro_batches(self, world_size: int) -> int:
        """Micro-batches per rank and iteration."""
        return self.batch_size(world_size) // (self.micro_batch_size * (world_size // self.model_parallel))
