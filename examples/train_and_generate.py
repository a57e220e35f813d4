#!/usr/bin/env python
"""Train, generate, train on: rollouts between training steps, on the same parameters, of which none moves.

    torchrun --nproc-per-node 4 examples/train_and_generate.py --head-dim-parallel 2,2 --head-dim-exchange weights \\
        --train-iters 60 --rollout-interval 20 --seed 1 --num-layers 2 --hidden-size 64 --num-attention-heads 4 \\
        --seq-length 64 --position-embedding-type rope --micro-batch-size 4 --lr 3e-3

Flags are those of examples/pretrain_gpt.py, beside the three of rollouts. A training step moves weights to where the
tokens are; a rollout keeps keys and values, each rank those of its own sequences. Both read the shards where they lie,
as a loop of reinforcement learning would, and the losses are those of training alone.
"""

import argparse
import sys
import warnings
from collections.abc import Sequence

if __name__ == "__main__":
    from hp_plugin.processes.rank import begin_rank

    begin_rank()  # first of all: how it ends must be settled before anything can go wrong
    # Every rank would say which optional packages Megatron-Core does without and which torch calls it uses still.
    warnings.filterwarnings("ignore", module="megatron")
    warnings.filterwarnings("ignore", ".* is deprecated", FutureWarning, "torch.distributed")

from hp_plugin.generation.decoding import generate
from hp_plugin.generation.sampling import Sampling
from hp_plugin.generation.tokenizers import ByteTokenizer
from hp_plugin.processes.refusals import refuse
from hp_plugin.training.arguments import parse_arguments
from hp_plugin.training.checks import check_config
from hp_plugin.training.config import TrainingConfig
from hp_plugin.training.data import batches, build_datasets
from hp_plugin.training.distributed import find_world_size, prepare_device, running_ranks
from hp_plugin.training.log import TrainingLog, print_rank_0
from hp_plugin.training.option_groups import BYTE_VOCABULARY
from hp_plugin.training.step import Trainer, build_trainer, train_step
from hp_plugin.training.transformer import build_transformer_config


def rollouts(trainer: Trainer, prompts: Sequence[str], new_tokens: int, seed: int) -> list[str]:
    """What the model as it is now makes of prompts; it is in training mode again behind."""
    model, tokenizer = trainer.model[0], ByteTokenizer()
    streams, texts = [tokenizer.stream() for _ in prompts], list(prompts)
    model.eval()
    try:
        for step in generate(
            model,
            [tokenizer.encode(prompt) for prompt in prompts],
            new_tokens,
            vocabulary=BYTE_VOCABULARY,
            sampling=Sampling(temperature=0.8, seed=seed),
        ):
            for number, token in enumerate(step.tokens):
                texts[number] += "" if token is None else streams[number].feed(token)
    finally:
        model.train()
    return [text + stream.rest() for text, stream in zip(texts, streams, strict=True)]


def train(config: TrainingConfig, interval: int, prompts: Sequence[str], new_tokens: int) -> dict[int, float]:
    """{iteration: lm loss} (on the last rank) of training with rollouts every so many iterations."""
    prepare_device()
    check_config(config, find_world_size())
    transformer_config = build_transformer_config(config)
    with running_ranks(config) as device:
        trainer = build_trainer(config, transformer_config, device)
        places = [parameter.data_ptr() for parameter in trainer.model[0].parameters()]
        train_set, _, _ = build_datasets(config, trainer.batch_size)
        train_batches = batches(train_set, config, config.train_iters, trainer.batch_size)
        with TrainingLog(trainer) as log:
            for iteration in range(1, config.train_iters + 1):
                log.iteration(iteration, train_step(trainer, train_batches))
                if iteration % interval == 0:
                    for text in rollouts(trainer, prompts, new_tokens, seed=iteration):
                        print_rank_0(f" > after iteration {iteration}: {text!r}")
        assert places == [parameter.data_ptr() for parameter in trainer.model[0].parameters()], "a parameter has moved"
        return log.losses


def main() -> None:
    """Runs the command line; a mistake in it ends with one line on stderr and status 2."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--rollout-interval", type=int, default=10)
    parser.add_argument("--rollout-tokens", type=int, default=32)
    parser.add_argument("--rollout-prompts", nargs="+", default=["def ", "import ", "class ", "return "])
    own, words = parser.parse_known_args()
    sys.argv[1:] = words
    config = parse_arguments(words)
    try:
        train(config, own.rollout_interval, own.rollout_prompts, own.rollout_tokens)
    except ValueError as mistake:
        refuse(str(mistake))


if __name__ == "__main__":
    main()
