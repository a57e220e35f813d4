"""Which releases of Megatron-Core the plugin was run with, and how a difference to them is said."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from megatron.core.package_info import __version__ as found

KNOWN = ("0.15.3", "0.16.1", "0.17.1", "0.19.0")


def check_parameters(what: str, function: Callable[..., Any], names: tuple[str, ...]) -> None:
    """Refuses an upstream function that lacks one of the parameters the plugin passes or reads.

    Raises:
        RuntimeError: names the function, its parameters, the release found and those known to work.
    """
    parameters = tuple(inspect.signature(function).parameters)
    missing = [name for name in names if name not in parameters]
    if missing:
        raise RuntimeError(
            f"{what} has no parameter {', '.join(missing)} (it has {', '.join(parameters)}): this is Megatron-Core "
            f"{found}, and hp_plugin is known to work with {', '.join(KNOWN)}. Use one of these, or a newer hp_plugin"
        )
