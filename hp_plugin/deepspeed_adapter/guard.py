"""Makes `deepspeed.initialize` refuse a configuration that names the grid, unless the adapter calls it.

DeepSpeed passes over top-level keys it does not know: a plain call would train without the grid's groups and without a
word. The guard is put up by the adapter, as soon as a grid is registered; it waits for DeepSpeed, and imports nothing.
"""

from __future__ import annotations

import importlib.machinery
import inspect
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any

KEY = "head_dim_parallel"
"""The grid's name at the top level of a DeepSpeed configuration."""

_MODULE = "deepspeed.runtime.config"
_adapter_calls: ContextVar[bool] = ContextVar("adapter_calls", default=False)


def guard_plain_deepspeed() -> None:
    """From now on, in this process, DeepSpeed takes a configuration with `KEY` only from the adapter.

    Warns instead if DeepSpeed's `DeepSpeedConfig` does not look as it did in the release this was written for.
    """
    loaded = sys.modules.get(_MODULE)
    if loaded is not None and hasattr(loaded, "DeepSpeedConfig"):
        _guard(loaded)
    elif not any(isinstance(finder, _WhenLoaded) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenLoaded())


@contextmanager
def adapter_calls() -> Iterator[None]:
    """Inside this block the configuration was read by the adapter, and DeepSpeed may see it."""
    token = _adapter_calls.set(True)
    try:
        yield
    finally:
        _adapter_calls.reset(token)


def _guard(module: ModuleType) -> None:
    """Wraps `DeepSpeedConfig._initialize_params`: every way to `initialize`, under whatever name, goes through it."""
    config_class: Any = module.DeepSpeedConfig
    stock = getattr(config_class, "_initialize_params", None)
    if getattr(stock, "guards_head_dim_parallel", False):
        return
    # Delete this module once DeepSpeed refuses unknown top-level keys by itself.
    if stock is None or list(inspect.signature(stock).parameters) != ["self", "param_dict"]:
        warnings.warn(
            f"cannot make deepspeed.initialize refuse {KEY!r}: {_MODULE}.DeepSpeedConfig has no "
            "_initialize_params(self, param_dict), as it has in DeepSpeed 0.19.8; see to it yourself that only "
            "hp_plugin.deepspeed_adapter.engine.initialize is called",
            RuntimeWarning,
            stacklevel=3,
        )
        return

    @wraps(stock)
    def guarded(self: Any, param_dict: dict[str, Any]) -> None:
        if KEY in param_dict and not _adapter_calls.get():
            raise ValueError(
                f"the DeepSpeed configuration has {KEY!r}, which deepspeed.initialize would ignore: call "
                "hp_plugin.deepspeed_adapter.engine.initialize in its place (same arguments, same result), or take "
                "the key out"
            )
        stock(self, param_dict)

    guarded.guards_head_dim_parallel = True  # type: ignore[attr-defined]
    config_class._initialize_params = guarded


class _WhenLoaded(MetaPathFinder):
    """Guards DeepSpeed's configuration module when it is first imported, then is gone."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_guard(module: ModuleType) -> None:
            execute(module)
            _guard(module)

        spec.loader.exec_module = execute_and_guard  # type: ignore[method-assign]
        return spec
