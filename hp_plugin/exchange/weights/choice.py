"""What a pass through a model's layers moves: weights or activations."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig

from hp_plugin.config import HeadDimConfig
from hp_plugin.exchange.rules import RULES, Counted, candidates, choose
from hp_plugin.exchange.shapes import attention_shape
from hp_plugin.exchange.sizes import BlockShape


class Choice:
    """Decides for every pass, for all layers of it alike, from what all ranks and pipeline stages know.

    A pass is of one micro-batch, forward and, where its model trains, backward; recompute finds the same as forward.

    Args:
        config: the model's.
        whole_tokens: whether mixtures of experts take what stock's ranks hold.
    """

    def __init__(self, config: TransformerConfig, whole_tokens: bool = False) -> None:
        self._config = config
        self.whole_tokens = whole_tokens
        self.vocabulary = 0
        self.embedding_shared = self.output_shared = False
        head_dim: HeadDimConfig = config.head_dim_parallel
        self._head_dim = head_dim
        latent = getattr(config, "multi_latent_attention", False)
        names = candidates(head_dim.exchange, head_dim.n)
        self._names = tuple(name for name in names if RULES[name].latent or not latent)
        self._made: dict[Any, bool] = {}

    @property
    def free(self) -> bool:
        """Whether there is a choice at all."""
        return any(not RULES[name].moves_weights for name in self._names)

    @property
    def can_gather(self) -> bool:
        """Whether weights may move at all."""
        return any(RULES[name].moves_weights for name in self._names)

    def keep_weights(self) -> None:
        """From now on activations move, whatever is counted.

        Raises:
            ValueError: there is no choice.
        """
        if not self.free:
            raise ValueError(f"exchange `{self._names[0]}` always moves weights")
        self._names = tuple(name for name in self._names if not RULES[name].moves_weights)
        self._made.clear()

    def gathers(
        self,
        s: int,
        b: int,
        training: bool,
        rotary: int = 0,
        alone: tuple[str, ...] = (),
        cache: int = 0,
        packed: bool = False,
    ) -> bool:
        """Whether weights move in a pass.

        Args:
            s, b: the whole micro-batch.
            training: whether there is a backward pass.
            rotary: rotated channels per head.
            alone: what the pass asks for that only stock's inner attention does, each after "cannot".
            cache: tokens of each sequence that are cached when the pass attends, its own among them; 0: there is no
                cache. Both kinds of pass leave it alike, so that prompts choose; single tokens are too few to.
            packed: whether sequences are packed, whose tokens activations cannot trade.

        Raises:
            RefusedError: no exchange can carry the shape.
        """
        if not self.free:
            return True
        if (cache and s == 1) or not self.can_gather:
            return False
        if packed:
            return True
        key = (s, b, training, rotary, alone, cache)
        if key not in self._made:
            counted = self.counted(s, b, training, rotary, alone, cache)
            self._made[key] = RULES[counted.name].moves_weights
            self._say(counted, s, b, "training" if training else "prompt" if cache else "forward-only")
        return self._made[key]

    def counted(
        self, s: int, b: int, training: bool, rotary: int = 0, alone: tuple[str, ...] = (), cache: int = 0
    ) -> Counted:
        """Bytes that the ranks of all pipeline stages send in one pass, one of each stage's added up."""
        block = self._layers(s, b, rotary, alone, cache)
        names, itemsize = self._names, self._config.params_dtype.itemsize
        return choose(self._head_dim.exchange, block, training, itemsize, lambda rule: rule.name in names)

    def _layers(self, s: int, b: int, rotary: int, alone: tuple[str, ...], cache: int) -> BlockShape:
        config = self._config
        shape = replace(attention_shape(config, self._head_dim, b, s, rotary, alone), cache=cache)
        further = getattr(config, "mtp_num_layers", None) or 0
        stages = config.pipeline_model_parallel_size * (config.virtual_pipeline_model_parallel_size or 1)
        mixtures = _mixtures(config)
        mixtures += mixtures[-1:] * further
        biases = config.add_bias_linear
        return BlockShape(
            shape,
            config.hidden_size,
            config.ffn_hidden_size,
            dense=mixtures.count(False),
            moe=mixtures.count(True),
            gated=config.gated_linear_unit,
            whole_tokens=self.whole_tokens,
            sequence_parallel=config.sequence_parallel,
            qkv_bias=biases or config.add_qkv_bias,
            mlp_bias=biases,
            recompute=config.recompute_granularity == "full",
            blocks=stages + further,
            vocabulary=self.vocabulary,
            embedding_shared=self.embedding_shared,
            output_shared=self.output_shared,
        )

    def _say(self, counted: Counted, s: int, b: int, kind: str) -> None:
        """Once for each kind of pass and what it moves, on the first rank; of prompts beside the text that follows."""
        said = vars(self._config).setdefault("head_dim_said", set())
        if (kind, counted.name) in said or dist.get_rank() != 0:
            return
        said.add((kind, counted.name))
        stages = self._config.pipeline_model_parallel_size
        each = Counted({name: sent / stages for name, sent in counted.bytes.items()})
        what = "weights" if RULES[counted.name].moves_weights else f"activations (`{counted.name}`)"
        print(
            f" > --head-dim-exchange {self._head_dim.exchange}: {kind} passes of {b} x {s} tokens move {what}; "
            f"a rank sends per micro-batch: {each.reason}",
            file=sys.stderr if kind == "prompt" else sys.stdout,
            flush=True,
        )


def _mixtures(config: TransformerConfig) -> list[bool]:
    """Which layers are mixtures of experts, as Megatron-Core's layer specs count them."""
    if not config.num_moe_experts:
        return [False] * config.num_layers
    frequency = config.moe_layer_freq
    if isinstance(frequency, int):
        return [number % frequency == 0 for number in range(config.num_layers)]
    return [bool(one) for one in frequency]
