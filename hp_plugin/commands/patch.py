"""`hp-plugin patch DIR`: make a Megatron-LM tree take the plugin's flags by itself, or no longer."""

from __future__ import annotations

import argparse
from pathlib import Path

from hp_plugin.megatron_lm import patch

NOT_PATCHED = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments."""
    parser.add_argument("directory", metavar="DIR", type=Path, help="root of a Megatron-LM tree")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--check",
        action="store_true",
        help="change nothing; exit status 0 if the tree is patched, 1 if it could be, 2 if it is none the patch fits",
    )
    mode.add_argument("--revert", action="store_true", help="take the plugin's lines out again")


def run(args: argparse.Namespace) -> int:
    """Patches, reverts or checks; see `--check` for the exit status."""
    made_for = patch.Patch.read()
    if args.check:
        tree = patch.examine(args.directory, made_for)
        print(f"{tree.path} is {'patched' if tree.patched else 'not patched'} ({tree.release})")
        return 0 if tree.patched else NOT_PATCHED
    print((patch.revert if args.revert else patch.apply)(args.directory, made_for))
    return 0
