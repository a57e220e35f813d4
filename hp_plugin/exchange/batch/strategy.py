"""`batch`: whole heads of a share of the samples."""

from __future__ import annotations

from typing import Any

from megatron.core.tensor_parallel.mappings import all_to_all
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from hp_plugin.exchange.batch.rule import BatchRule
from hp_plugin.exchange.kv_cache import SequencesOfRank, reserved
from hp_plugin.exchange.strategy import Angles, Exchange


class BatchExchange(Exchange):
    """Every rank trades its d/n slice of b samples for the full d of its b/n samples, and back.

    Receives (n-1)/n of the local QKV activation in one all-to-all over the dim axis, and (n-1)/n of the attention
    output in another. With n = 1 both maps are the identity.
    """

    rule = BatchRule()

    def to_heads(self, mixed: Tensor) -> Tensor:
        """[s, b, slots · d/n] -> [s, b/n, slots · d], what stock SelfAttention expects at TP = m."""
        if self.n == 1:
            return mixed
        s, b, _ = mixed.shape
        # [s, b, slots · d/n] -> [n, s, b/n, slots, d/n]: one block of samples for each rank of the dim group
        blocks = mixed.view(s, self.n, b // self.n, self.layout.slots, self.layout.width).transpose(0, 1)
        traded = all_to_all(self.groups.dim, blocks.contiguous())
        # [n, s, b/n, slots, d/n] -> [s, b/n, slots · d]: the slices of a head side by side
        return traded.permute(1, 2, 3, 0, 4).reshape(s, b // self.n, -1)

    def to_slices(self, context: Tensor) -> Tensor:
        """[s, b/n, h/m · d] -> [s, b, h/m · d/n]."""
        if self.n == 1:
            return context
        s, share, _ = context.shape
        blocks = context.view(s, share, self.layout.heads, self.n, self.layout.width).permute(3, 0, 1, 2, 4)
        traded = all_to_all(self.groups.dim, blocks.contiguous())
        # [n, s, b/n, h/m, d/n] -> [s, b, h/m · d/n]
        return traded.transpose(0, 1).reshape(s, share * self.n, -1)

    def stock_cache(self, context: Any, layer: int, key: Tensor) -> Any:
        """Whole heads of an n-th of the sequences."""
        if self.n == 1:
            return context
        own = SequencesOfRank(context, self.n)
        reserved(context, layer, context.max_sequence_length, own.max_batch_size, key)
        return own

    def mask_share(self, mask: Tensor | None) -> Tensor | None:
        """Masks of a single sample serve all; masks per sample are cut to this rank's samples."""
        if mask is None or self.n == 1 or mask.shape[0] == 1:
            return mask
        return mask.chunk(self.n, dim=0)[self.j]

    def split_angles(self, angles: Angles, config: TransformerConfig) -> tuple[Angles, Angles]:
        """Angles are shared by all samples, except multimodal ones with a sample axis."""
        query, key = (self._share(angle) for angle in angles)
        return (query, key), (None, None)

    def _share(self, angle: Tensor | None) -> Tensor | None:
        per_sample = angle is not None and angle.shape[1] > 1 and self.n > 1
        return angle.chunk(self.n, dim=1)[self.j] if per_sample else angle
