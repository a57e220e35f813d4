"""Predictions of throughput, communication and memory; standard library only, every figure with its source."""

from hp_plugin.planner.inputs.layout import Layout
from hp_plugin.planner.inputs.model_shape import ModelShape
from hp_plugin.planner.inputs.models import load_model
from hp_plugin.planner.inputs.workload import Workload
from hp_plugin.planner.machine.hardware import Hardware, load_hardware
from hp_plugin.planner.search.plan import Plan, make_plan
from hp_plugin.planner.seconds.prediction import Prediction
from hp_plugin.planner.seconds.step import predict

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
