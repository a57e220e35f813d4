"""Classes of quantized tensors; the stub has no such tensors."""

import torch


class QuantizedTensor(torch.Tensor):
    pass


class Float8Tensor(QuantizedTensor):
    pass
