"""Tokens behind prompts, one step after another, beside a static-batching key/value cache."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.utils import get_model_config
from torch import Tensor, nn

from hp_plugin.generation.sampler import Sampler
from hp_plugin.generation.sampling import Sampling


@dataclass(frozen=True)
class Step:
    """One pass through the model.

    Args:
        tokens: each sequence's next one; None where it is still in its prompt or has ended.
        seconds: of the pass, with choosing.
        prompt: whether the pass was the common part of the prompts.
        logits: `[sequences, vocabulary]` that were chosen from.
    """

    tokens: tuple[int | None, ...]
    seconds: float
    prompt: bool
    logits: Tensor | None = None


def check_prompts(prompts: Sequence[Sequence[int]], new_tokens: int, vocabulary: int, positions: int | None) -> int:
    """Refuses prompts that cannot be gone on with; returns the tokens that a cache has to hold of a sequence.

    Args:
        positions: that the model has learned; None where any will do.

    Raises:
        ValueError: the first that is wrong, with its number and the values.
    """
    if not prompts:
        raise ValueError("there is no prompt: give one")
    if new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, got {new_tokens}")
    for number, prompt in enumerate(prompts, start=1):
        if not prompt:
            raise ValueError(f"prompt {number} is empty: a model goes on from at least one token")
        outside = next((token for token in prompt if not 0 <= token < vocabulary), None)
        if outside is not None:
            raise ValueError(
                f"prompt {number} has the token {outside}, and the model knows 0 to {vocabulary - 1}: "
                "is the tokenizer the one that it was trained with?"
            )
    longest = max(map(len, prompts))
    if positions is not None and longest + new_tokens > positions:
        raise ValueError(
            f"a prompt of {longest} tokens and {new_tokens} new ones do not fit into the {positions} positions that "
            f"the model has learned: give a shorter prompt, or --max-new-tokens {max(positions - longest, 0)}"
        )
    return longest + new_tokens


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    vocabulary: int,
    end: int | None = None,
    sampling: Sampling | None = None,
    context: StaticInferenceContext | None = None,
) -> Iterator[Step]:
    """Goes on from each prompt by up to `new_tokens` tokens, all of them in one batch; the same on every rank.

    As in Megatron-Core's static batches all sequences are at one position: what the prompts have in common in length
    comes first in one pass, then a token of each at a time, read from the longer prompts and chosen for the others.

    Args:
        model: a GPTModel, or what wraps one, on this rank; in evaluation mode.
        vocabulary: tokens that may be chosen; the model may be padded beyond.
        end: token that ends a sequence.
        context: the cache; None makes one that fits. One that served before is started anew.

    Raises:
        ValueError: see `check_prompts`; the model is training, one stage of several or sequence-parallel; no cache
            layout fits the batch.
    """
    _check_model(model)
    total = check_prompts(prompts, new_tokens, vocabulary, None)
    context = context or StaticInferenceContext(len(prompts), total)
    context.reset()
    lengths = [len(prompt) for prompt in prompts]
    device = next(model.parameters()).device
    # A row more, for what is chosen last.
    tokens = torch.zeros(len(prompts), total + 1, dtype=torch.long)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    tokens = tokens.to(device)
    sampler = Sampler(sampling or Sampling(), len(prompts))
    running = [True] * len(prompts)
    start, stop = 0, min(lengths)
    while any(running):
        began = time.perf_counter()
        positions = torch.arange(start, stop, device=device).expand(len(prompts), -1)
        output = model(tokens[:, start:stop], positions, None, inference_context=context, runtime_gather_output=True)
        context.increment_sequence_len_offset(stop - start)
        logits = output[:, -1, :vocabulary]
        asking = [on and length <= stop for on, length in zip(running, lengths, strict=True)]
        if all(length <= stop for length in lengths):
            context.enable_decode_mode()
        chosen = sampler.pick(logits, asking)
        for number, token in enumerate(chosen):
            if token is not None:
                tokens[number, stop] = token
                running[number] = token != end and stop + 1 < lengths[number] + new_tokens
        yield Step(tuple(chosen), time.perf_counter() - began, start == 0, logits)
        start, stop = stop, stop + 1


def _check_model(model: nn.Module) -> None:
    if model.training:
        raise ValueError("the model is in training mode: call model.eval() first, and model.train() behind")
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        raise ValueError("generation runs the whole model in one pipeline stage: load it with PP = 1")
    if get_model_config(model).sequence_parallel:
        raise ValueError("a single token cannot be split over tensor-parallel ranks: leave out --sequence-parallel")
