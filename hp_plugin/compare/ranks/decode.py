"""Decode steps of a layout: prompts are cached, then every sequence gets one token after another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import Float16Module
from torch import Tensor, nn

from hp_plugin.compare.entries.decoding import TOKENS, cached_passes, decode_config, sequences_of_rank
from hp_plugin.compare.entries.entrant import Entrant
from hp_plugin.compare.ranks.running import taken_down
from hp_plugin.training.config import TrainingConfig
from hp_plugin.training.distributed import running_ranks
from hp_plugin.training.initialization import initialize_parameters
from hp_plugin.training.model import build_gpt
from hp_plugin.training.transformer import build_transformer_config

_PROMPT_BYTES = 2**28
"""Scores of prompts that stock's unfused attention may have at a time; so many sequences go through it together."""


class Decoder:
    """A model beside a cache that holds prompts of `context` tokens, the same on every layout."""

    def __init__(self, model: nn.Module, config: TrainingConfig, context: int, device: torch.device) -> None:
        self._model, self._context, self._device = model, context, device
        drawn = torch.Generator().manual_seed(config.seed)
        batch = config.global_batch_size or config.micro_batch_size
        every = torch.randint(config.padded_vocab_size, (batch, context + TOKENS + 1), generator=drawn)
        copies, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
        self.tokens = every.chunk(copies)[rank].to(device)
        self.cache = StaticInferenceContext(len(self.tokens), context + TOKENS)
        self._fill(config)

    def step(self, number: int) -> Tensor:
        """The scores behind token number `number` after the prompts, [sequences, vocabulary]."""
        self.cache.sequence_len_offset = self._context + number
        return self._pass(self.tokens, self._context + number, self._context + number + 1)

    def steps(self) -> None:
        """As many steps as there is room for."""
        for number in range(TOKENS):
            self.step(number)
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def loss(self) -> float:
        """Mean cross-entropy of the tokens that follow, over all ranks, from one step at a time."""
        found = torch.zeros((), device=self._device)
        for number in range(TOKENS):
            after = self.tokens[:, self._context + number + 1]
            found += nn.functional.cross_entropy(self.step(number).float(), after) / TOKENS
        torch.distributed.all_reduce(found, group=parallel_state.get_data_parallel_group())
        return float(found) / parallel_state.get_data_parallel_world_size()

    def cached_bytes(self) -> int:
        """Bytes that this rank has reserved."""
        tensors = [tensor for pair in self.cache.key_value_memory_dict.values() for tensor in pair]
        return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}.values())

    def _fill(self, config: TrainingConfig) -> None:
        n = config.head_dim.n if config.head_dim is not None else 1
        at_once = max(1, _PROMPT_BYTES // (4 * config.num_attention_heads * self._context**2)) // n * n
        size = len(self.tokens) if len(self.tokens) % n else max(n, at_once)
        for part in self.tokens.split(size):
            self._pass(part, 0, self._context)
            self.cache.increment_batch_size_offset(len(part))
        self.cache.reset_batch_size_offset()
        self.cache.enable_decode_mode()

    def _pass(self, tokens: Tensor, start: int, stop: int) -> Tensor:
        positions = torch.arange(start, stop, device=self._device).expand(len(tokens), -1)
        with torch.no_grad():
            return self._model(
                tokens[:, start:stop], positions, None, inference_context=self.cache, runtime_gather_output=True
            )[:, -1]


@contextmanager
def decoding(entrant: Entrant, context: int, spread: float | None = None) -> Iterator[Decoder]:
    """A layout's model with prompts of `context` tokens cached; it and its process groups are gone after the block.

    Args:
        spread: standard deviation of the weights, where it is not the model's.
    """
    config = decode_config(entrant.config, context)
    config = config if spread is None else replace(config, init_method_std=spread)
    with taken_down(config), running_ranks(config) as device:
        passes = cached_passes(sequences_of_rank(config), context)
        transformer_config = build_transformer_config(config, cached=passes)
        model: GPTModel = build_gpt(config, transformer_config)
        initialize_parameters([model], transformer_config, config.seed)
        half = config.fp16 or config.bf16
        whole = Float16Module(transformer_config, model.to(device)) if half else model.to(device)
        yield Decoder(whole.eval(), config, context, device)
