"""Predictions of throughput, communication and memory; standard library only, every figure with its source."""

from hp_plugin.cost.hardware import Hardware, load_hardware
from hp_plugin.cost.layout import Layout
from hp_plugin.cost.model_shape import ModelShape, load_model
from hp_plugin.cost.planner import Plan, make_plan
from hp_plugin.cost.predict import predict
from hp_plugin.cost.prediction import Prediction
from hp_plugin.cost.workload import Workload

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
