"""The old name of `hp_plugin.planner`; goes with release 0.3."""

import warnings

from hp_plugin.planner import *  # noqa: F403 - whatever the new name offers
from hp_plugin.planner import __all__ as __all__

warnings.warn(
    "hp_plugin.cost is hp_plugin.planner now; the old name goes with hp-plugin 0.3", DeprecationWarning, stacklevel=2
)
