"""The keys and values that Megatron-Core's static-batching contexts keep, divided between the ranks of a dim group.

Megatron-Core's own: `StaticInferenceContext.key_value_memory_dict`, a pair of `[tokens, sequences, g/m, d]` per layer.
A rank's part of it has fewer sequences or fewer tokens, and always whole heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def reserved(context: Any, layer: int, tokens: int, sequences: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's keys and values of one layer, `[tokens, sequences, g/m, d]` each, made when they are first asked for.

    A context may serve one batch after another; where the next one is divided otherwise, it starts anew.

    Args:
        context: a static-batching context.
        like: keys `[.., g/m, d]`, whose heads, dtype and device the memory has.

    Raises:
        ValueError: what the context holds of this batch is divided otherwise.
    """
    shape = (tokens, sequences, *like.shape[-2:])
    memory: tuple[Tensor, Tensor] | None = context.key_value_memory_dict.get(layer)
    if memory is not None and memory[0].shape != shape:
        if context.sequence_len_offset or context.batch_size_offset:
            raise ValueError(
                f"this batch is cached as {memory[0].shape[1]} sequences of {memory[0].shape[0]} tokens on each rank, "
                f"and these of its sequences would be as {sequences} of {tokens}: the parts of a batch must be all "
                "divisible by the slices n or all not"
            )
        # The same bytes where both ways divide evenly; freed before others are reserved where not.
        memory = _seen_as(memory, shape) if memory[0].numel() == torch.Size(shape).numel() else None
        context.key_value_memory_dict.pop(layer)
    if memory is None:
        memory = (like.new_empty(shape), like.new_empty(shape))
    context.key_value_memory_dict[layer] = memory
    return memory


def _seen_as(memory: tuple[Tensor, Tensor], shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return memory[0].view(shape), memory[1].view(shape)


def cached_tokens(context: Any, s: int) -> int:
    """Tokens of each sequence cached when a pass of s tokens attends, its own among them; 0 without a context."""
    return 0 if context is None else getattr(context, "sequence_len_offset", 0) + s


def check_room(context: Any, s: int, b: int) -> None:
    """Refuses b sequences of s tokens that do not fit behind what a static-batching context holds.

    Raises:
        ValueError: with the sizes.
    """
    before, sequences = context.sequence_len_offset, context.batch_size_offset
    if before + s > context.max_sequence_length:
        raise ValueError(
            f"{s} tokens behind {before} do not fit into a key/value cache of {context.max_sequence_length} tokens: "
            "give fewer, or the context a larger max_sequence_length"
        )
    if sequences + b > context.max_batch_size:
        raise ValueError(
            f"{b} sequences behind {sequences} do not fit into a key/value cache of {context.max_batch_size}: "
            "give fewer, or the context a larger max_batch_size"
        )


class SequencesOfRank:
    """A static-batching context as stock's attention sees it on a rank that has an n-th of its sequences."""

    def __init__(self, context: Any, n: int) -> None:
        self._context, self._n = context, n

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    @property
    def max_batch_size(self) -> int:
        """Of all sequences."""
        return -(-self._context.max_batch_size // self._n)

    @property
    def batch_size_offset(self) -> int:
        """Sequences of this rank in earlier parts of the batch."""
        return self._context.batch_size_offset // self._n
