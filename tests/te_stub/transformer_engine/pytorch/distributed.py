"""Recompute and random states, which Megatron-Core wraps."""

from contextlib import contextmanager

import torch


class CudaRNGStatesTracker:
    def __init__(self):
        self.states_ = {}

    def reset(self):
        self.states_ = {}

    def get_states(self):
        return dict(self.states_)

    def set_states(self, states):
        self.states_ = states

    def add(self, name, seed):
        self.states_[name] = torch.Generator().manual_seed(seed).get_state()

    @contextmanager
    def fork(self, name="model-parallel-rng"):
        before = torch.get_rng_state()
        torch.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(before)


def get_all_rng_states():
    return {}


@contextmanager
def activation_recompute_forward(activation_recompute=False, recompute_phase=False):
    yield


def checkpoint(
    function, *args, distribute_saved_activations=False, get_rng_state_tracker=None, tp_group=None, **kwargs
):
    assert tp_group is not None, "recompute of Transformer Engine's modules needs the TP group"
    from megatron.core.tensor_parallel import checkpoint as stock

    return stock(lambda *given: function(*given, **kwargs), distribute_saved_activations, *args)
