"""What decoding asks of a compared layout."""

from __future__ import annotations

from dataclasses import replace

from hp_plugin.compare.entries.entrant import Entrant
from hp_plugin.training.config import TrainingConfig
from hp_plugin.training.distributed import find_world_size
from hp_plugin.training.transformer import build_transformer_config

TOKENS = 8
"""Decode steps that are timed together."""
GATE_CONTEXT = 24
"""Tokens of the prompts that the loss gate caches."""


def decode_config(config: TrainingConfig, context: int) -> TrainingConfig:
    """The layout's model to decode with behind prompts of `context` tokens."""
    learned = config.position_embedding_type == "learned_absolute"
    return replace(
        config,
        max_position_embeddings=max(config.seq_length, context + TOKENS) if learned else None,
        use_distributed_optimizer=False,
        recompute_granularity=None,
        recompute_method=None,
        recompute_num_layers=None,
        moe_expert_capacity_factor=None,
    )


def sequences_of_rank(config: TrainingConfig, world: int | None = None) -> int:
    """Sequences that one copy of the model decodes."""
    world = world or find_world_size()
    return config.batch_size(world) * config.model_parallel // world


def cached_passes(sequences: int, context: int) -> tuple[tuple[int, int, int], ...]:
    """The passes, as `build_transformer_config` takes them; prompts may go through the model in parts."""
    return ((1, sequences, context + TOKENS),)


def check_decodes(entrant: Entrant, context: int, world: int) -> None:
    """Refuses a layout that cannot decode, before ranks are started.

    Raises:
        ValueError: with the way out.
    """
    config, name = entrant.config, entrant.name
    if config.pipeline_model_parallel_size > 1 or config.context_parallel_size > 1 or config.sequence_parallel:
        raise ValueError(
            f"layout {name!r}: --mode decode runs the whole model on every TP group: leave out pp, cp and sp"
        )
    if not entrant.exact:
        raise ValueError(f"layout {name!r}: --mode decode compares exact layouts: give another exchange")
    if config.batch_size(world) * config.model_parallel % world:
        raise ValueError(f"layout {name!r}: {config.batch_size(world)} sequences do not divide over its copies")
    try:
        build_transformer_config(
            decode_config(config, context), world, cached_passes(sequences_of_rank(config, world), context)
        )
    except ValueError as refusal:
        raise ValueError(f"layout {name!r}: {refusal}") from refusal
