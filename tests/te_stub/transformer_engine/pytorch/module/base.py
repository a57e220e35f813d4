"""What all modules share: the TP group, FP8 state, and what is checked before a forward pass."""

import math
import pickle

import torch
import torch.distributed as dist

from transformer_engine.pytorch.fp8 import FP8GlobalStateManager


def divide(whole, parts):
    assert whole % parts == 0, f"{whole} is not divisible by {parts}"
    return whole // parts


def get_dummy_wgrad(shape, dtype, zero=False):
    return torch.zeros(shape, dtype=dtype)


class TransformerEngineBaseModule(torch.nn.Module):
    def __init__(self, name=None):
        super().__init__()
        self.fp8 = False
        self.fp8_meta = {}
        self.tp_group = None
        self.tp_size = 1
        self.tp_group_initialized = False
        self.sequence_parallel = False

    def set_tensor_parallel_group(self, tp_group):
        self.tp_group = tp_group
        self.tp_group_initialized = True

    def get_extra_state(self):
        """Bytes of the scaling factors, empty without FP8."""
        state = pickle.dumps(self.fp8_meta["history"]) if self.fp8 else b""
        return torch.frombuffer(bytearray(state), dtype=torch.uint8) if state else torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state):
        if state is not None and state.numel():
            self.fp8_meta["history"] = pickle.loads(bytes(state.tolist()))

    def _join(self, tp_group, tp_size):
        if tp_group is None:
            self.tp_size = tp_size
            if tp_size == 1:
                self.set_tensor_parallel_group(None)
        else:
            self.tp_size = dist.get_world_size(tp_group)
            self.set_tensor_parallel_group(tp_group)

    def _prepare(self, tokens):
        if self.tp_size > 1:
            assert self.tp_group_initialized, "TP group not initialized."
        self.fp8 = FP8GlobalStateManager.is_fp8_enabled()
        if not self.fp8:
            return
        recipe = FP8GlobalStateManager.get_fp8_recipe()
        if recipe.delayed():
            if self.sequence_parallel:
                assert recipe.reduce_amax, "Amax reduction is necessary when using sequence parallelism with FP8."
            # The largest values are reduced over this group when the context ends: every rank of it has to be there.
            FP8GlobalStateManager.modules.append((type(self).__name__, FP8GlobalStateManager.group))
        self.fp8_meta = {"recipe": recipe, "history": [float(tokens.detach().abs().max())]}

    def _check_fp8(self, *factors):
        block = self.fp8_meta["recipe"].block
        rows = 8 if block == 16 else block
        for tensor in factors:
            if math.prod(tensor.shape[:-1]) % rows or tensor.shape[-1] % block:
                raise AssertionError(
                    f"FP8 execution needs rows divisible by {rows} and columns by {block}, got {list(tensor.shape)}"
                )

    @staticmethod
    def _fill(weight, init_method, tracker):
        if init_method is None:
            init_method = torch.nn.init.normal_
        if tracker is None:
            init_method(weight.data)
            return
        with tracker().fork():
            init_method(weight.data)

    @staticmethod
    def _mark(parameter, axis):
        parameter.tensor_model_parallel = axis is not None
        parameter.partition_dim = -1 if axis is None else axis
        parameter.partition_stride = 1
