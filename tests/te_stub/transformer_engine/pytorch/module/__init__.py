"""Linears and norms, with what they check, computed by torch and Megatron-Core's own collectives."""

import torch

from transformer_engine.pytorch.module.base import TransformerEngineBaseModule, divide
from transformer_engine.released import bound


class _Linear(TransformerEngineBaseModule):
    """What `Linear` and `LayerNormLinear` have in common; `given` are the arguments of the constructor."""

    modes = ("row", "column", None)

    def _build(self, given):
        self.in_features, self.out_features = given["in_features"], given["out_features"]
        self.use_bias = given.get("bias", True)
        self.return_bias = given.get("return_bias", False)
        self.apply_bias = self.use_bias and not self.return_bias
        self._join(given.get("tp_group"), given.get("tp_size", 1))
        self.parallel_mode = given.get("parallel_mode")
        assert self.parallel_mode in self.modes, f"parallel_mode {self.parallel_mode} not supported"
        if self.parallel_mode == "column":
            self.out_features = divide(self.out_features, self.tp_size)
        elif self.parallel_mode == "row":
            self.in_features = divide(self.in_features, self.tp_size)
        self.sequence_parallel = self.tp_size > 1 and bool(given.get("sequence_parallel"))
        overlaps = [name for name in given if name.startswith("ub_") and name != "ub_name" and given[name]]
        assert not overlaps or given.get("ub_name") is not None, "an overlapped layer needs ub_name"
        self.ub_overlaps = overlaps
        dtype = given.get("params_dtype") or torch.get_default_dtype()
        device = given.get("device", "cuda")
        weight = torch.nn.Parameter(torch.empty(self.out_features, self.in_features, device=device, dtype=dtype))
        self._fill(weight, given.get("init_method"), given.get("get_rng_state_tracker"))
        self.weight = weight
        axis = {"column": 0, "row": 1}.get(self.parallel_mode)
        self._mark(weight, axis)
        if self.use_bias:
            self.bias = torch.nn.Parameter(torch.zeros(self.out_features, device=device, dtype=dtype))
            self._mark(self.bias, 0 if axis == 0 else None)
            if self.parallel_mode == "row":
                self.bias.sequence_parallel = self.sequence_parallel
        else:
            self.bias = torch.Tensor().to(dtype=dtype, device=device)

    def _multiplied(self, tokens):
        """The product with the weight, gathered or reduced as its mode asks."""
        from megatron.core.tensor_parallel import mappings

        assert tokens.shape[-1] == self.in_features, "GEMM not possible"
        group, split = self.tp_group, self.tp_size > 1
        if self.parallel_mode == "column" and split:
            enter = (
                mappings.gather_from_sequence_parallel_region
                if self.sequence_parallel
                else mappings.copy_to_tensor_model_parallel_region
            )
            tokens = enter(tokens, group=group)
        if self.fp8:
            self._check_fp8(tokens, self.weight)
        output = torch.nn.functional.linear(tokens, self.weight, self.bias if self._fuses_bias else None)
        if self.parallel_mode == "row" and split:
            leave = (
                mappings.reduce_scatter_to_sequence_parallel_region
                if self.sequence_parallel
                else mappings.reduce_from_tensor_model_parallel_region
            )
            output = leave(output, group=group)
        if self.apply_bias and not self._fuses_bias:
            output = output + self.bias
        return (output, self.bias) if self.return_bias else output

    @property
    def _fuses_bias(self):
        return self.apply_bias and self.parallel_mode != "row"


class Linear(_Linear):
    def __init__(self, *args, **kwargs):
        given = bound("Linear.__init__", args, kwargs)
        super().__init__()
        self._build(given)

    def forward(self, *args, **kwargs):
        tokens = bound("Linear.forward", args, kwargs)["inp"]
        self._prepare(tokens)
        return self._multiplied(tokens)


class LayerNormLinear(_Linear):
    modes = ("column", None)

    def __init__(self, *args, **kwargs):
        given = bound("LayerNormLinear.__init__", args, kwargs)
        super().__init__()
        self._build(given)
        self.normalization = given.get("normalization", "LayerNorm")
        assert self.normalization in ("LayerNorm", "RMSNorm"), "Unsupported normalization type!"
        self.eps = given.get("eps", 1e-5)
        self.zero_centered_gamma = given.get("zero_centered_gamma", False)
        kind = dict(dtype=self.weight.dtype, device=self.weight.device)
        start = 0.0 if self.zero_centered_gamma else 1.0
        self.layer_norm_weight = torch.nn.Parameter(torch.full((self.in_features,), start, **kind))
        self.layer_norm_bias = None
        if self.normalization == "LayerNorm":
            self.layer_norm_bias = torch.nn.Parameter(torch.zeros(self.in_features, **kind))
        for parameter in (self.layer_norm_weight, self.layer_norm_bias):
            if parameter is not None:
                parameter.sequence_parallel = self.sequence_parallel

    def forward(self, *args, **kwargs):
        tokens = bound("LayerNormLinear.forward", args, kwargs)["inp"]
        self._prepare(tokens)
        return self._multiplied(normalized(self, tokens, self.layer_norm_weight, self.layer_norm_bias))


class GroupedLinear(TransformerEngineBaseModule):
    def __init__(self, *args, **kwargs):
        raise NotImplementedError("the stub has no grouped linears: build experts one by one")


def normalized(module, tokens, weight, bias):
    """LayerNorm, or RMSNorm where there is no bias."""
    scale = weight + 1 if module.zero_centered_gamma else weight
    if bias is None:
        return torch.nn.functional.rms_norm(tokens, tokens.shape[-1:], scale, module.eps)
    return torch.nn.functional.layer_norm(tokens, tokens.shape[-1:], scale, bias, module.eps)


class _Norm(torch.nn.Module):
    def _build(self, given, with_bias):
        size = given.get("hidden_size") if given.get("normalized_shape") is None else given["normalized_shape"]
        self.eps = given.get("eps", 1e-5)
        self.zero_centered_gamma = given.get("zero_centered_gamma", False)
        dtype = given.get("params_dtype") or given.get("dtype") or torch.get_default_dtype()
        device = given.get("device", "cuda")
        start = 0.0 if self.zero_centered_gamma else 1.0
        self.weight = torch.nn.Parameter(torch.full((size,), start, dtype=dtype, device=device))
        self.bias = torch.nn.Parameter(torch.zeros(size, dtype=dtype, device=device)) if with_bias else None
        for parameter in self.parameters():
            parameter.sequence_parallel = bool(given.get("sequence_parallel"))

    def forward(self, tokens):
        return normalized(self, tokens, self.weight, self.bias)


class LayerNorm(_Norm):
    def __init__(self, *args, device="cuda", **kwargs):
        # The release takes further keywords (`device`, `dtype`) for torch's own norm.
        given = bound("LayerNorm.__init__", args, kwargs)
        super().__init__()
        self._build({**given, "device": device}, with_bias=True)


class RMSNorm(_Norm):
    def __init__(self, *args, device="cuda", **kwargs):
        given = bound("RMSNorm.__init__", args, kwargs)
        super().__init__()
        self._build({**given, "device": device}, with_bias=False)
