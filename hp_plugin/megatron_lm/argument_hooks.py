"""The two replacements around Megatron-LM's command line; they can go once it lets plugins add and check flags."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from hp_plugin.config import HeadDimConfig
from hp_plugin.megatron_lm import flags
from hp_plugin.megatron_lm.rank_files import check_files_to_load
from hp_plugin.megatron_lm.releases import check_parameters
from hp_plugin.processes.refusals import refuse


class ArgumentHooks:
    """`add_megatron_arguments` and `validate_args` with our flags; `head_dim` is None until a grid has been read."""

    def __init__(self, arguments: ModuleType, argv: Sequence[str]) -> None:
        self.head_dim: HeadDimConfig | None = None
        self._arguments = arguments
        self._argv = list(argv)
        self._add: Callable[..., argparse.ArgumentParser] = arguments.add_megatron_arguments
        self._validate: Callable[..., Any] = arguments.validate_args

    @staticmethod
    def installed_in(arguments: ModuleType) -> bool:
        """Whether a module's functions are replaced already."""
        return isinstance(getattr(arguments.validate_args, "__self__", None), ArgumentHooks)

    def check(self) -> None:
        """Raises RuntimeError if the functions to replace are not as known."""
        check_parameters("megatron.training.arguments.add_megatron_arguments", self._add, ("parser",))
        check_parameters("megatron.training.arguments.validate_args", self._validate, ("args", "defaults"))

    def install(self) -> None:
        """Replaces the functions, `validate_args` also where other modules have imported it by name."""
        self._arguments.add_megatron_arguments = self.add_arguments
        for module in [module for name, module in sys.modules.items() if name.startswith("megatron.training")]:
            for name, value in list(vars(module).items()):
                if value is self._validate:
                    setattr(module, name, self.validate)

    def add_arguments(self, parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """`add_megatron_arguments`, and our flags."""
        if any(word.split("=")[0] == "--yaml-cfg" for word in self._argv):
            # Here, since Megatron-LM goes on with the file's content alone.
            parser.error(f"--yaml-cfg leaves no room for {flags.GRID_FLAG}: give the run's arguments as flags")
        return flags.add_arguments(self._add(parser))

    def validate(self, args: argparse.Namespace, *rest: Any, **kwargs: Any) -> Any:
        """`validate_args` after our own checks; what these refuse ends the program as a parser's error does."""
        try:
            self.head_dim = flags.settle(args, self._argv)
            if self.head_dim is not None:
                check_files_to_load(args)
        except ValueError as mistake:
            refuse(str(mistake), sys.argv[0])
        return self._validate(args, *rest, **kwargs)
