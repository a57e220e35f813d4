"""Command line -> TrainingConfig: one argparse flag per field, one argparse group per group of options."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, NoReturn

from hp_plugin.processes.refusals import refuse
from hp_plugin.refusal import shorten
from hp_plugin.training.config import TrainingConfig
from hp_plugin.training.option_groups import GROUPS
from hp_plugin.training.options import flag, kind_of


def build_parser() -> argparse.ArgumentParser:
    """The parser of the reference trainer; every flag is a field of `TrainingConfig`."""
    parser = argparse.ArgumentParser(
        description="Pretrain a GPT with Megatron-Core, stock or on a head × dimension grid.",
        allow_abbrev=False,
    )
    for title, group in GROUPS.items():
        section = parser.add_argument_group(title)
        for option in fields(group):
            section.add_argument(flag(option.name), **_argument(option))
    return parser


def parse_arguments(arguments: Sequence[str] | None = None) -> TrainingConfig:
    """Reads the command line (`sys.argv` by default).

    Raises:
        SystemExit: status 2, after one line on stderr, when a flag is unknown, malformed, out of its domain or missing.
    """
    parser = build_parser()
    parser.error = _refuse_words  # type: ignore[method-assign]
    try:
        return TrainingConfig(**vars(parser.parse_args(arguments)))
    except ValueError as mistake:
        refuse(str(mistake))


def _refuse_words(message: str) -> NoReturn:
    refuse(shorten(message, 250))  # argparse repeats a word whole


def _argument(option: Field[Any]) -> dict[str, Any]:
    """argparse's description of one field, from its annotation (a string here), default and metadata."""
    annotation, domain = kind_of(option), option.metadata["domain"]
    text = option.metadata["help"].replace("%", "%%")
    if domain is not None:
        text += f" [{domain.words}]"
    if annotation == "bool":
        return {"action": "store_true", "help": text}
    described: dict[str, Any] = {"help": text, "choices": option.metadata["choices"]}
    if option.default is MISSING:
        described["required"] = True
    else:
        described["default"] = option.default
    if annotation == "tuple[str, ...]":
        return described | {"nargs": "+", "action": _Tuple}
    return described | {"type": _CONVERTERS[annotation]}


class _Tuple(argparse.Action):
    """Stores several values as a tuple: the configuration is frozen and hashable."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, tuple(values))


def _integer_pair(text: str) -> tuple[int, int]:
    try:
        left, right = (int(number) for number in text.strip("() ").split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"takes two integers left,right (for example 127,0), got {text!r}") from None
    return left, right


_CONVERTERS = {"int": int, "float": float, "str": str, "tuple[int, int]": _integer_pair}
