"""Operations that Megatron-Core names in annotations and base classes."""

from torch import nn


class FusibleOperation(nn.Module):
    pass


class Sequential(nn.Sequential):
    pass


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (FusibleOperation,), {})
