"""The old name of `hp_plugin.megatron_lm.hooks`, which trees patched by release 0.1 import; goes with release 0.3."""

import warnings

from hp_plugin.megatron_lm.hooks import install

__all__ = ["install"]

warnings.warn(
    "hp_plugin.megatron_adapter.hooks is hp_plugin.megatron_lm.hooks now: run `hp-plugin patch` on this tree again; "
    "the old name goes with hp-plugin 0.3",
    DeprecationWarning,
    stacklevel=2,
)
