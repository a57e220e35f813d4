"""Recipes of quantization, as far as Megatron-Core makes them and the stub looks at them."""

from enum import Enum


class Format(Enum):
    E4M3 = 1
    HYBRID = 2


class Recipe:
    block = 16

    def __init__(self, fp8_format=Format.HYBRID, fp8_dpa=False, fp8_mha=False):
        self.fp8_format, self.fp8_dpa, self.fp8_mha = fp8_format, fp8_dpa, fp8_mha

    def delayed(self):
        return isinstance(self, DelayedScaling)


class DelayedScaling(Recipe):
    def __init__(
        self, margin=0, fp8_format=Format.HYBRID, amax_history_len=1024, amax_compute_algo="max",
        scaling_factor_compute_algo=None, override_linear_precision=(False, False, False), reduce_amax=True,
        fp8_dpa=False, fp8_mha=False, **ignored,  # as pydantic's dataclasses do
    ):  # fmt: skip
        super().__init__(fp8_format, fp8_dpa, fp8_mha)
        self.reduce_amax, self.amax_history_len = reduce_amax, amax_history_len


class Float8CurrentScaling(Recipe):
    pass


class MXFP8BlockScaling(Recipe):
    block = 32


class Float8BlockScaling(Recipe):
    block = 128
