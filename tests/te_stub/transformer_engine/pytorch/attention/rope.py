"""Rotary positions as the fused kernel takes them."""

import torch

from transformer_engine.released import bound


def apply_rotary_pos_emb(*args, **kwargs):
    given = bound("apply_rotary_pos_emb", args, kwargs)
    states, freqs = given["t"], given["freqs"]
    assert given.get("tensor_format", "sbhd") == "sbhd" and given.get("fused"), "the stub knows the fused sbhd kernel"
    assert freqs.dim() == 4 and freqs.shape[1] == freqs.shape[2] == 1, f"expected [s, 1, 1, d], got {freqs.shape}"
    assert freqs.dtype == torch.float32, f"the fused kernel reads fp32 frequencies, got {freqs.dtype}"
    assert states.shape[0] <= freqs.shape[0], f"{states.shape[0]} positions, {freqs.shape[0]} angles"
    width = freqs.shape[-1]
    assert width <= states.shape[-1], f"{width} rotated channels of {states.shape[-1]}"
    angles = freqs[: states.shape[0]]
    turned, left = states[..., :width], states[..., width:]
    if given.get("interleaved"):
        half = torch.stack((-turned[..., 1::2], turned[..., ::2]), dim=-1).flatten(-2)
    else:
        first, second = turned.chunk(2, dim=-1)
        half = torch.cat((-second, first), dim=-1)
    rotated = (turned * angles.cos() + half * angles.sin()).to(states.dtype)
    return torch.cat((rotated, left), dim=-1)
