"""One replacement of one upstream function, with what it was made for and when it can go."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

TORCH = ("torch", "2.13.0")
MEGATRON = ("megatron-core", "0.16.1")


@dataclass(frozen=True)
class Hook:
    """Replaces `owner.name` by `replacement(original)` once what it finds there looks as known."""

    owner: str
    """Dotted path of the module or class that holds the function."""
    name: str
    replacement: Callable[[Any], Any]
    """Takes the original and returns what stands in its place from then on."""
    until: str
    """The change upstream after which this hook can be deleted."""
    made_for: tuple[str, str]
    """Distribution and release that `parameters` and `fragment` were read from."""
    parameters: tuple[str, ...] | None = None
    """Names of the parameters; None for functions compiled without a signature."""
    fragment: tuple[str, str] | None = None
    """Dotted path of a module, class or function, and a piece of its source that the hook is there for."""

    def check(self) -> None:
        """Raise `RuntimeError`, with found and known side by side, if upstream is not what the hook replaces."""
        original = getattr(_resolve(self.owner), self.name, None)
        if not callable(original):
            self._refuse(f"{original!r}", "a function or class")
        if self.parameters is not None:
            found = inspect.signature(original).parameters
            if not _accepts(found, self.parameters):
                self._refuse(f"parameters ({', '.join(found)})", f"({', '.join(self.parameters)})")
        if self.fragment is not None and self.fragment[1] not in inspect.getsource(_resolve(self.fragment[0])):
            self._refuse(f"no such line in {self.fragment[0]}", f"the line {self.fragment[1]!r}")

    def apply(self) -> None:
        """Put the replacement in place, for the rest of the process."""
        owner = _resolve(self.owner)
        setattr(owner, self.name, self.replacement(getattr(owner, self.name)))

    def _refuse(self, found: str, known: str) -> None:
        distribution, release = self.made_for
        raise RuntimeError(
            f"the CPU backend replaces {self.owner}.{self.name} as of {distribution} {release}, where it knows "
            f"{known}; {distribution} {version(distribution)} has {found}. "
            f"Install {distribution} {release}, or train on a GPU, where nothing is replaced"
        )


def _resolve(path: str) -> Any:
    return pkgutil.resolve_name(path)


def _accepts(found: Any, known: tuple[str, ...]) -> bool:
    """True if the known parameters are there, in their order, and nothing else is required."""
    names = [name for name in found if name in known]
    others = [parameter for name, parameter in found.items() if name not in known]
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return names == list(known) and all(
        parameter.kind in variable or parameter.default is not inspect.Parameter.empty for parameter in others
    )
