"""The old name of `hp_plugin.planner`; goes with release 0.3."""

import warnings

from hp_plugin.planner import (
    Hardware,
    Layout,
    ModelShape,
    Plan,
    Prediction,
    Workload,
    load_hardware,
    load_model,
    make_plan,
    predict,
)

__all__ = [
    "Hardware",
    "Layout",
    "ModelShape",
    "Plan",
    "Prediction",
    "Workload",
    "load_hardware",
    "load_model",
    "make_plan",
    "predict",
]

warnings.warn(
    "hp_plugin.cost is hp_plugin.planner now; the old name goes with hp-plugin 0.3", DeprecationWarning, stacklevel=2
)
