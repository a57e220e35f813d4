"""Embedding, output layer and loss on this rank's share of the tokens, where that moves less than the tokens do.

They are part of the block's work then: their weights are gathered like a layer's, and what stock's block would take and
return never is there whole. In passes whose activations move they do as stock does.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

from megatron.core import num_microbatches_calculator
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.mappings import all_to_all
from torch import Tensor, nn

from hp_plugin.exchange.dropout_rng import DIM_PARALLEL_RNG, ensure_rng
from hp_plugin.exchange.replicas import mark_partial
from hp_plugin.exchange.weights.block import Block, Pass
from hp_plugin.exchange.weights.cross_entropy import vocabulary_cross_entropy
from hp_plugin.exchange.weights.gathering import Chain, LayerWeights
from hp_plugin.exchange.weights.layers import (
    GatheringColumnLinear,
    WeightsTransformerLayer,
    inference_context,
    mixed,
)
from hp_plugin.exchange.weights.rule import embedding_moves_less, output_moves_less
from hp_plugin.exchange.weights.shards import Shard
from hp_plugin.exchange.weights.whole_tokens import count_once


def move_ends(model: GPTModel) -> None:
    """Moves the ends that this stage of a model has to its share, if tokens outweigh the vocabulary."""
    layers = list(model.decoder.layers)
    # Further predictions go through the same ends, from hidden states of all tokens.
    if not layers or not isinstance(layers[0], WeightsTransformerLayer) or model.config.mtp_num_layers:
        return
    tokens, block = _tokens_of_micro_batch(model), layers[0].block
    grid, sequence_parallel = block.groups.grid, model.config.sequence_parallel
    if any(grid.tp_rank(i, j) != i * grid.n + j for i in range(grid.m) for j in range(grid.n)):
        return  # a dim group's parts of the vocabulary are no neighbours
    sizes = (model.vocab_size, tokens, grid.m, grid.size, sequence_parallel)
    # Stages that have neither end count them, too, and choose as those that do.
    choice = block.choice
    choice.vocabulary = model.vocab_size
    choice.embedding_shared, choice.output_shared = embedding_moves_less(*sizes), output_moves_less(*sizes)
    if model.pre_process and choice.embedding_shared:
        _Embedding(model, block, layers[0])
    if model.post_process and choice.output_shared:
        _Output(model, block)
        layers[-1].last = False


def _tokens_of_micro_batch(model: GPTModel) -> int:
    """s · b as far as it is known; 0 if it is not."""
    b = getattr(model.config, "micro_batch_size", None)
    if b is None and num_microbatches_calculator._GLOBAL_NUM_MICROBATCHES_CALCULATOR is not None:
        b = num_microbatches_calculator.get_micro_batch_size()
    return (b or 0) * (getattr(model.config, "seq_length", None) or model.max_sequence_length)


class _Embedding:
    """Takes the rank's own tokens to hidden states, and begins the block with the whole micro-batch's shape."""

    def __init__(self, model: GPTModel, block: Block, layer: WeightsTransformerLayer) -> None:
        self._block, self._config, self._layer = block, model.config, layer
        self._layer.first = False
        self._asked: dict[str, Any] = {}
        rotary = getattr(model, "rotary_pos_emb", None)
        self._rotary = 0 if rotary is None else 2 * rotary.inv_freq.shape[-1]
        embedding = model.embedding
        words = embedding.word_embeddings
        words.__class__ = mixed(GatheringEmbedding, type(words))
        shard = Shard(words, "weight", 0, 1, block.groups.grid.n)
        words.gather_with(block, shard, Chain(block.groups.dim).add([words], [shard], recomputed=False))
        for parameter in embedding.parameters():
            stock_sums = self._config.sequence_parallel and getattr(parameter, "sequence_parallel", False)
            if parameter is not words.weight and not stock_sums:
                mark_partial(parameter)
        for module in embedding.modules():
            count_once(module, block)
        embedding.register_forward_pre_hook(self._cut, with_kwargs=True)
        embedding.forward = self._on_share(embedding)
        self._signature = inspect.signature(model.forward)
        model.register_forward_pre_hook(self._note, with_kwargs=True)
        if rotary is not None:
            rotary.get_rotary_seq_len = self._length(rotary.get_rotary_seq_len)

    def _note(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        given = self._signature.bind(*args, **kwargs).arguments
        # Hidden states that come from elsewhere, as those of images do, are of all tokens.
        self._layer.first = given.get("decoder_input") is not None
        self._asked = {
            "packed": given.get("packed_seq_params") is not None,
            "context": inference_context(given),
        }

    def _cut(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        ids = kwargs["input_ids"]
        passing = self._block.begin(ids.shape[1], ids.shape[0], module.training, rotary=self._rotary, **self._asked)
        if passing.share is None:
            return None
        names = ("input_ids", "position_ids")
        return args, {name: _own(passing, value) if name in names else value for name, value in kwargs.items()}

    def _length(self, stock: Callable[..., int]) -> Callable[..., int]:
        """Stock reads a sequence's length off the hidden states, which may be a share here, or asks the cache."""

        def length(cache: Any, *args: Any, **kwargs: Any) -> int:
            passing = self._block.current
            whole = self._layer.first or passing.share is None or cache is not None
            return stock(cache, *args, **kwargs) if whole else passing.s

        return length

    def _on_share(self, embedding: nn.Module) -> Callable[..., Tensor]:
        """Its forward pass, in which the head group is the TP group that stock cuts a sequence over."""
        forward = embedding.forward

        def on_share(*args: Any, **kwargs: Any) -> Tensor:
            if self._block.current.share is None:
                return forward(*args, **kwargs)
            kept, embedding.tp_group = embedding.tp_group, self._block.groups.head
            try:
                with self._dropout():
                    return forward(*args, **kwargs)
            finally:
                embedding.tp_group = kept

        return on_share

    def _dropout(self) -> AbstractContextManager[Any]:
        """Tokens of other ranks of the dim axis must not meet the same masks."""
        if not self._config.hidden_dropout or self._config.sequence_parallel:
            return nullcontext()
        ensure_rng(DIM_PARALLEL_RNG, self._block.groups.head)
        return get_cuda_rng_tracker().fork(DIM_PARALLEL_RNG)


class GatheringEmbedding:
    """A vocabulary-parallel embedding that runs, as stock's at TP = m, on the weight of its head group."""

    def gather_with(self, block: Block, shard: Shard, layer: LayerWeights) -> None:
        """Where its weight comes from, in passes of this block whose weights move."""
        self._block, self._shard, self._layer = block, shard, layer

    def forward(self, ids: Tensor) -> Tensor:
        if self._block.current.share is None:
            return super().forward(ids)
        groups = self._block.groups
        whole = self._layer.whole(self._shard)  # [V/m, D]
        start = groups.head.rank() * whole.shape[0]
        shadows = {
            "weight": whole,
            "tp_group": groups.head,
            "vocab_start_index": start,
            "vocab_end_index": start + whole.shape[0],
        }
        kept = {name: vars(self)[name] for name in shadows if name in vars(self)}
        # An entry of its own hides the parameter of this name.
        vars(self).update(shadows)
        try:
            return super().forward(ids)
        finally:
            for name in shadows:
                del vars(self)[name]
            vars(self).update(kept)


class _Output:
    """Takes the rank's own hidden states through the last norm and the output layer to losses of all tokens."""

    def __init__(self, model: GPTModel, block: Block) -> None:
        self._model, self._block = model, block
        stock = model.compute_language_model_loss
        layer = model.output_layer
        holder = layer if layer.weight is not None else model.embedding.word_embeddings
        GatheringColumnLinear.adopt(layer, block.groups, holder)
        layer.gather_with(block.chain.add([layer], list(layer.shards.values()), recomputed=False), block)
        stock_sums = model.config.sequence_parallel
        norm = model.decoder.final_layernorm
        for parameter in [] if norm is None else norm.parameters():
            if not (stock_sums and getattr(parameter, "sequence_parallel", False)):
                mark_partial(parameter)
        if norm is not None:
            count_once(norm, block)
        self._signature = inspect.signature(model.forward)
        model.register_forward_hook(self._logits, with_kwargs=True)
        model.compute_language_model_loss = lambda labels, logits: self._loss(stock, labels, logits)

    def _loss(self, stock: Callable[[Tensor, Tensor], Tensor], labels: Tensor, logits: Tensor) -> Tensor:
        """[b, s] losses of all tokens, from labels [b, s] and this rank's logits [s, b/n, V/m] or [s/n, b, V/m]."""
        model, head, passing = self._model, self._block.groups.head, self._block.current
        if passing.share is None:
            return stock(labels, logits)
        own = _own(passing, labels)
        if model.config.cross_entropy_loss_fusion:
            kept, model.pg_collection = model.pg_collection, copy.copy(model.pg_collection)
            model.pg_collection.tp = head
            try:
                losses = stock(own, logits).transpose(0, 1)
            finally:
                model.pg_collection = kept
        else:
            losses = vocabulary_cross_entropy(logits, own.transpose(0, 1).contiguous(), head)
        return self._all_tokens(losses).transpose(0, 1).contiguous()

    def _all_tokens(self, own: Tensor) -> Tensor:
        """What a head group holds alike, of all tokens."""
        return replace(self._block.current.share, sequence_parallel=False).whole(own)

    def _logits(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Where there are no labels: stock's logits [b, s, V/P] of all tokens, from this rank's."""
        share, given = self._block.current.share, self._signature.bind(*args, **kwargs).arguments
        if share is None or given.get("labels") is not None:
            return output
        own, n = output.transpose(0, 1), self._block.groups.grid.n
        # Behind a prompt stock asks for the last token alone; a share of tokens has at least two.
        last = inference_context(given) is not None and own.shape[0] == 1
        if own.shape[-1] == self._model.vocab_size:
            whole = share.whole_last(own) if last else self._all_tokens(own.contiguous())
            return whole.transpose(0, 1).contiguous()
        # [s, b/n, n · V/P] -> [n, s, b/n, V/P]: to every rank of the dim group its part of the vocabulary
        parts = all_to_all(self._block.groups.dim, own.unflatten(2, (n, -1)).movedim(2, 0).contiguous())
        return (share.join_last(parts) if last else share.join(parts)).transpose(0, 1).contiguous()


def _own(passing: Pass, by_sample: Tensor) -> Tensor:
    """[b, s] -> this rank's samples or tokens."""
    return passing.share.cut(by_sample.transpose(0, 1)).transpose(0, 1).contiguous()
