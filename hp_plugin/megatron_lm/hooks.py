"""Makes the plugin's flags work in a Megatron-LM that knows nothing of them; without them it touches nothing."""

from __future__ import annotations

import sys
from collections.abc import Sequence

PREFIX = "--head-dim-"


def wanted(argv: Sequence[str]) -> bool:
    """Whether a command line has one of our flags, or asks for the help text in which they stand."""
    return any(word.startswith(PREFIX) or word in ("-h", "--help") for word in argv)


def install(argv: Sequence[str] | None = None) -> None:
    """Replaces the few functions of Megatron-LM that the flags in `argv` (default: `sys.argv[1:]`) need; twice is once.

    Raises:
        RuntimeError: a function to replace is not as in the releases known to work; nothing is replaced then.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not wanted(argv):
        return
    # Only now: a run without the flags must not depend on what these import.
    from megatron.training import arguments, checkpointing

    from hp_plugin.megatron_lm.argument_hooks import ArgumentHooks
    from hp_plugin.megatron_lm.checkpoint_hooks import CheckpointHooks
    from hp_plugin.megatron_lm.model_hooks import ModelHooks

    if ArgumentHooks.installed_in(arguments):
        return
    in_arguments = ArgumentHooks(arguments, argv)
    others = [ModelHooks(lambda: in_arguments.head_dim), CheckpointHooks(checkpointing, lambda: in_arguments.head_dim)]
    for hooks in (in_arguments, *others):
        hooks.check()
    for hooks in (in_arguments, *others):
        hooks.install()
