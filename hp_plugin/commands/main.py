"""The `hp-plugin` command: one subcommand per module, each loaded only when it is the one asked for."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from hp_plugin import __version__

# name -> (module with `add_arguments(parser)` and `run(args) -> exit status`, what the command does)
COMMANDS = {
    "compare": ("hp_plugin.commands.compare", "measure stock and grid layouts of a model side by side on this machine"),
    "plan": ("hp_plugin.commands.plan", "predict speed, communication time and memory of every layout of a model"),
    "generate": ("hp_plugin.commands.generate", "go on from prompts with a checkpoint of the trainer, on any layout"),
    "patch": ("hp_plugin.commands.patch", "make a Megatron-LM tree take --head-dim-parallel by itself, or no longer"),
    "doctor": (
        "hp_plugin.commands.doctor",
        "say what is installed, what training will run on and what is missing for what",
    ),
}

INTERRUPTED = 130  # 128 + SIGINT, as shells report it
PIPE_CLOSED = 141  # 128 + SIGPIPE


def build_parser(wanted: str | None) -> argparse.ArgumentParser:
    """The parser of the whole command, with the arguments of subcommand `wanted` alone."""
    parser = argparse.ArgumentParser(prog="hp-plugin", description="Attention on an m × n head × dimension grid.")
    parser.add_argument("--version", action="version", version=f"hp-plugin {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if name == wanted:
            loaded = import_module(module)
            loaded.add_arguments(command)
            command.set_defaults(run=loaded.run)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit status; a user's mistake is one line on stderr and status 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        parser = build_parser(next((word for word in words if not word.startswith("-")), None))
        args = parser.parse_args(words)
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone, and the interpreter would complain when it flushes the rest at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except (ValueError, OSError, ImportError) as mistake:
        print(f"hp-plugin: error: {' '.join(str(mistake).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
