"""Which keys a query may see, in the conventions of Megatron-Core's local attention, or by document."""

from __future__ import annotations

import torch
from torch import Tensor


def hidden_keys(
    queries: range, keys: int, causal: bool, window: tuple[int, int] | None, device: torch.device
) -> Tensor | None:
    """True where a key is hidden: `[len(queries), keys]`, or None if all of them are visible.

    `window` is (left, right) in positions, -1 for unlimited, and includes causality when right is 0, as in
    Megatron-Core's `window_size`.
    """
    if window is None and (not causal or queries.start >= keys - 1):
        return None
    position = torch.arange(queries.start, queries.stop, device=device).unsqueeze(1)
    key = torch.arange(keys, device=device)
    if window is None:
        return key > position
    left, right = window
    hidden = torch.zeros(len(queries), keys, dtype=torch.bool, device=device)
    if left >= 0:
        hidden |= key < position - left
    if right >= 0:
        hidden |= key > position + right
    return hidden


def mask_rows(mask: Tensor, queries: range) -> Tensor:
    """The rows of a given mask `[b or 1, 1, s or 1, s]` (True: hidden) that belong to `queries`.

    Raises:
        ValueError: the mask differs by head.
    """
    if mask.dim() != 4 or mask.shape[1] != 1:
        raise ValueError(
            f"an attention mask of shape {tuple(mask.shape)} cannot be used here: exchanges `sequence` and `scores` "
            "take [b or 1, 1, s or 1, s]; --head-dim-exchange batch takes masks per head, where n divides the batch"
        )
    return mask if mask.shape[2] == 1 else mask[:, :, queries.start : queries.stop]


def document_numbers(bounds: Tensor, tokens: int) -> Tensor:
    """Which document each of `tokens` packed tokens is of, `[tokens]`, from `bounds` = [0, end of the first, ..]."""
    positions = torch.arange(tokens, device=bounds.device, dtype=bounds.dtype)
    return torch.searchsorted(bounds[1:], positions, right=True)


def document_positions(bounds: Tensor, numbers: Tensor) -> Tensor:
    """Each packed token's place in its document, `[tokens]`."""
    return torch.arange(len(numbers), device=bounds.device) - bounds[numbers]


def names_documents(mask: Tensor | None) -> bool:
    """Whether a mask is the number of each token's document, `[s]`, in place of what is hidden from each query."""
    return mask is not None and not mask.is_floating_point() and mask.dtype != torch.bool


def other_documents(numbers: Tensor, queries: range, keys: int) -> Tensor:
    """True where a key is of another document than the query: `[len(queries), keys]`."""
    return numbers[queries.start : queries.stop, None] != numbers[None, :keys]
