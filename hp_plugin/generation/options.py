"""What `hp-plugin generate` and examples/generate.py are asked for."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from hp_plugin.exchange.rules import AUTO, EXCHANGES
from hp_plugin.generation.sampling import Sampling
from hp_plugin.grid.ranks import DIM_INNERMOST, ORDERS


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """A checkpoint, the layout to run it on, prompts, and how to go on from them.

    Args:
        load: directory that the trainer's --save named.
        prompts: texts.
        new_tokens: at most so many behind each.
        tensor_model_parallel_size, head_dim_parallel, head_dim_exchange, head_dim_order: as the trainer's.
        tokenizer: `bytes`, or a Hugging Face tokenizer; None for that of the default data.
        past_end: go on behind a token that ends a text.
    """

    load: str
    prompts: tuple[str, ...]
    new_tokens: int = 128
    sampling: Sampling = field(default_factory=Sampling)
    tensor_model_parallel_size: int | None = None
    head_dim_parallel: str | None = None
    head_dim_exchange: str = AUTO
    head_dim_order: str = DIM_INNERMOST
    tokenizer: str | None = None
    past_end: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options to a parser or subparser."""
    parser.add_argument("--load", required=True, metavar="DIR", help="checkpoints of the reference trainer, its --save")
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", nargs="+", metavar="TEXT", help="texts to go on from (default: standard input)")
    prompts.add_argument(
        "--prompt-file", metavar="FILE", help="one text, or FILE.json with a list of texts; - is standard input"
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="tokens behind each prompt")
    parser.add_argument("--past-end", action="store_true", help="go on behind the token that ends a text")
    parser.add_argument("--tokenizer", help="bytes, or a folder or name of a Hugging Face tokenizer on this machine")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the most likely token every time")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="draw from the K most likely tokens")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw from the most likely P of them")
    parser.add_argument("--seed", type=int, default=0, help="gives the same tokens on every layout")
    parser.add_argument("--tensor-model-parallel-size", type=int, metavar="TP", help="ranks (default 1, or m·n)")
    parser.add_argument("--head-dim-parallel", metavar="m,n", help="attention grid; auto = widest m for the TP size")
    parser.add_argument("--head-dim-exchange", default=AUTO, choices=EXCHANGES, help="what a dim group exchanges")
    parser.add_argument("--head-dim-order", default=DIM_INNERMOST, choices=ORDERS, help="which axis has neighbours")


def read_options(args: argparse.Namespace) -> GenerationOptions:
    """The options that were parsed, with the prompts read.

    Raises:
        ValueError: a file of prompts is none, or an option is nothing that it can be.
    """
    return GenerationOptions(
        load=args.load,
        prompts=_prompts(args),
        new_tokens=args.max_new_tokens,
        sampling=Sampling(args.temperature, args.top_k, args.top_p, args.seed),
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        head_dim_parallel=args.head_dim_parallel,
        head_dim_exchange=args.head_dim_exchange,
        head_dim_order=args.head_dim_order,
        tokenizer=args.tokenizer,
        past_end=args.past_end,
    )


def _prompts(args: argparse.Namespace) -> tuple[str, ...]:
    if args.prompt is not None:
        return tuple(args.prompt)
    if args.prompt_file is None or args.prompt_file == "-":
        return (sys.stdin.read(),)
    path = Path(args.prompt_file)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as unreadable:
        raise ValueError(f"--prompt-file {path} cannot be read: {unreadable}") from unreadable
    if path.suffix != ".json":
        return (text,)
    try:
        texts = json.loads(text)
    except ValueError as malformed:
        raise ValueError(f"--prompt-file {path} is no JSON: {malformed}") from malformed
    if not isinstance(texts, list) or not texts or not all(isinstance(one, str) for one in texts):
        raise ValueError(f"--prompt-file {path} must be a list of texts")
    return tuple(texts)
