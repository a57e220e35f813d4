"""Stock's core attention on torch's fused kernels, behind Megatron's own choice of an attention backend.

`flash` and `fused` take them in the place of Megatron-Core's local attention, which is unfused, and in the place of
Transformer Engine's where it has no fused kernel to train with; `local` and `unfused` are stock's, and so is `auto`,
which says where the fused kernels would save memory.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.extensions import transformer_engine
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from hp_plugin.attention.core_attention import layer_window
from hp_plugin.exchange.fused_kernels import fused_attention
from hp_plugin.upstream.spec_tree import Replacement, with_replacements

FUSED_BACKENDS = (AttnBackend.flash, AttnBackend.fused)
TRANSFORMER_ENGINE_HEAD_DIM = 256
"""Transformer Engine has FlashAttention and cuDNN up to this head dimension, and unfused attention beyond."""
MENTIONED_BYTES = 2**26
"""Scores of one layer and micro-batch, 64 MiB of them, from which on `auto` says that they need not be kept."""

_said: set[str] = set()


class FusedCoreAttention:
    """Mixed into a stock core attention; parameter-free, so checkpoint keys stay stock.

    What torch's kernels do not do (softmax offsets, attention bias, packed sequences, context parallelism, FP8, the
    largest logits) goes on to the stock class.
    """

    def __init__(
        self,
        *args: Any,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        softmax_scale: float | None = None,
        attention_dropout: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            *args,
            config=config,
            layer_number=layer_number,
            attn_mask_type=attn_mask_type,
            softmax_scale=softmax_scale,
            attention_dropout=attention_dropout,
            **kwargs,
        )
        self._window = layer_window(config, layer_number)
        self._scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale
        self._dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self._fuses = config.attention_backend in FUSED_BACKENDS and not _stock_alone(config)
        recomputed = config.recompute_granularity == "full" or "core_attn" in (config.recompute_modules or ())
        self._keeps = config.recompute_granularity is None or not recomputed
        # Where sequence parallelism is on, the ranks of a TP group draw from streams of their own already.
        self._forks = not config.sequence_parallel

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        given = attention_bias is None and packed_seq_params is None and query.dim() == 4
        seen = self._seen(attention_mask, attn_mask_type, query.shape[0], key.shape[0]) if given else None
        if not self._fuses or seen is None:
            if seen is not None and self._keeps and torch.is_grad_enabled():
                _say_what_is_kept(query, key)
            return super().forward(
                query,
                key,
                value,
                attention_mask,
                attn_mask_type=attn_mask_type,
                attention_bias=attention_bias,
                packed_seq_params=packed_seq_params,
                **kwargs,
            )
        mask, causal = seen
        dropout = self._dropout if self.training else 0.0
        with self._dropout_stream() if dropout else nullcontext():
            return fused_attention(
                query,
                key,
                value,
                mask=mask,
                causal=causal,
                window=self._window,
                scale=self._scale,
                dropout=dropout,
            )

    def _dropout_stream(self) -> AbstractContextManager[Any]:
        return get_cuda_rng_tracker().fork() if self._forks else nullcontext()

    def _seen(
        self, mask: Tensor | None, mask_type: AttnMaskType | None, queries: int, keys: int
    ) -> tuple[Tensor | None, bool] | None:
        """The mask to heed and whether later keys are hidden, as the stock class takes them; None to leave it to it."""
        raise NotImplementedError


class FusedDotProductAttention(FusedCoreAttention, DotProductAttention):
    """Megatron-Core's local attention on torch's kernels: a window replaces a mask, and a mask causality."""

    def _seen(
        self, mask: Tensor | None, mask_type: AttnMaskType | None, queries: int, keys: int
    ) -> tuple[Tensor | None, bool] | None:
        # Of a single query stock takes all keys to be earlier; of others it knows no offset.
        causal = self.attn_mask_type == AttnMaskType.causal and mask is None and queries > 1
        return None if causal and queries != keys and self._window is None else (mask, causal)


class _AsTransformerEngine(FusedCoreAttention):
    """Transformer Engine's attention on torch's kernels: a causal layer ignores masks."""

    def _seen(
        self, mask: Tensor | None, mask_type: AttnMaskType | None, queries: int, keys: int
    ) -> tuple[Tensor | None, bool] | None:
        if mask_type == AttnMaskType.causal and queries == keys:
            return None, True
        if self._window is not None:
            return None
        if mask_type == AttnMaskType.no_mask:
            return None, False
        heeded = mask is not None and mask_type in (AttnMaskType.padding, AttnMaskType.arbitrary)
        return (mask, False) if heeded else None


@cache
def fused_te_attention(stock: type) -> type:
    """The same over Transformer Engine's class, which is there only where Transformer Engine is."""
    return type("FusedTEDotProductAttention", (_AsTransformerEngine, stock), {"__module__": __name__})


def with_fused_core(spec: Any, config: TransformerConfig) -> Any:
    """A layer or block spec whose core attention can use torch's kernels, where the backend leaves it to choose."""
    backend = getattr(config, "attention_backend", AttnBackend.auto)
    if backend not in (*FUSED_BACKENDS, AttnBackend.auto):
        return spec
    replacements = {DotProductAttention: Replacement(FusedDotProductAttention)}
    if transformer_engine.HAVE_TE and config.kv_channels > TRANSFORMER_ENGINE_HEAD_DIM:
        stock = transformer_engine.TEDotProductAttention
        replacements[stock] = Replacement(fused_te_attention(stock))
    return with_replacements(spec, replacements)


def _stock_alone(config: TransformerConfig) -> bool:
    """Whether the model asks of its core attention what torch's kernels do not do."""
    switches = ("fp8_dot_product_attention", "fp8_multi_head_attention", "qk_clip", "log_max_attention_logit")
    return (
        getattr(config, "softmax_type", "vanilla") != "vanilla"
        or config.context_parallel_size > 1
        or any(getattr(config, name, False) for name in switches)
    )


def _say_what_is_kept(query: Tensor, key: Tensor) -> None:
    """One line, once and on one rank, where scores are most of what attention keeps for its backward pass."""
    s_q, b, h, d = query.shape
    scores = b * h * s_q * key.shape[0] * query.element_size()
    beside = 2 * (query.numel() + b * key.shape[0] * key.shape[2] * d) * query.element_size()
    if scores < max(MENTIONED_BYTES, beside) or "kept" in _said:
        return
    _said.add("kept")
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(
            f"hp_plugin: stock's unfused attention keeps at least {scores / 2**20:,.0f} MiB of scores per layer and "
            f"micro-batch ({b} × {h} heads × {s_q} × {key.shape[0]}); --attention-backend fused keeps none of them",
            flush=True,
        )
