"""From options to what every rank is told, with everything refused that a user can get wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hp_plugin.generation.checkpoint import loaded_model, on_layout, recorded
from hp_plugin.generation.decoding import Step, check_prompts, generate
from hp_plugin.generation.options import GenerationOptions
from hp_plugin.generation.sampling import Sampling
from hp_plugin.generation.tokenizers import BYTES, Tokenizer, find_tokenizer
from hp_plugin.training.config import TrainingConfig
from hp_plugin.training.distributed import prepare_device, running_ranks
from hp_plugin.training.option_groups import BYTE_VOCABULARY
from hp_plugin.training.transformer import build_transformer_config


@dataclass(frozen=True)
class Job:
    """What all ranks are told.

    Args:
        folder: the checkpoint. config: its model on the layout to run.
        prompts: tokens. new_tokens: at most so many behind each.
        vocabulary: tokens that may be chosen. end: the one that ends a text, or None.
        passes: the kinds of passes, as `build_transformer_config` takes them.
    """

    folder: Path
    config: TrainingConfig
    prompts: tuple[tuple[int, ...], ...]
    new_tokens: int
    sampling: Sampling
    vocabulary: int
    end: int | None
    passes: tuple[tuple[int, int, int], ...]

    @property
    def ranks(self) -> int:
        """Ranks that it takes."""
        return self.config.tensor_parallel


def prepare(options: GenerationOptions) -> tuple[Job, Tokenizer]:
    """Reads the checkpoint's options and the prompts; no group is made and no weight read.

    Raises:
        ValueError: the first contradiction, with the values and the way out.
    """
    prepare_device()
    folder, saved = recorded(options.load)
    tokenizer = _tokenizer(options, saved)
    prompts = tuple(tuple(tokenizer.encode(prompt)) for prompt in options.prompts)
    vocabulary = (BYTE_VOCABULARY if saved.vocab_size is None else saved.vocab_size) + 1
    learned = saved.position_embedding_type == "learned_absolute"
    positions = (saved.max_position_embeddings or saved.seq_length) if learned else None
    total = check_prompts(prompts, options.new_tokens, vocabulary, positions)
    config = on_layout(
        saved,
        folder,
        len(prompts),
        tensor_model_parallel_size=options.tensor_model_parallel_size,
        head_dim_parallel=options.head_dim_parallel,
        head_dim_exchange=options.head_dim_exchange,
        head_dim_order=options.head_dim_order,
    )
    if config.padded_vocab_size % config.tensor_parallel:
        raise ValueError(
            f"the padded vocabulary of {config.padded_vocab_size} does not divide over {config.tensor_parallel} ranks: "
            "give another --tensor-model-parallel-size"
        )
    common = min(map(len, prompts))
    passes = ((common, len(prompts), common), (1, len(prompts), total))
    build_transformer_config(config, config.tensor_parallel, passes)
    end = None if options.past_end else tokenizer.end
    job = Job(folder, config, prompts, options.new_tokens, options.sampling, vocabulary, end, passes)
    return job, tokenizer


def _tokenizer(options: GenerationOptions, saved: TrainingConfig) -> Tokenizer:
    if options.tokenizer is None and (saved.data_path is not None or saved.mock_data):
        data = "mock data" if saved.data_path is None else f"--data-path {' '.join(saved.data_path)}"
        raise ValueError(f"the checkpoint was trained on {data}: name its tokenizer with --tokenizer")
    return find_tokenizer(options.tokenizer or BYTES)


def steps(job: Job) -> Iterator[Step]:
    """The job on this rank, one of those that torchrun or `hp_plugin.generation.start` have started.

    Raises:
        WrongModelError: on all ranks, if the checkpoint is of another model.
    """
    with running_ranks(job.config) as device:
        transformer_config = build_transformer_config(job.config, job.ranks, job.passes)
        model = loaded_model(job.config, transformer_config, job.folder, device)
        yield from generate(
            model,
            job.prompts,
            job.new_tokens,
            vocabulary=job.vocabulary,
            end=job.end,
            sampling=job.sampling,
        )
