"""The documented sets of comparisons that `hp-plugin compare --suite` runs."""

from __future__ import annotations

from dataclasses import dataclass, replace

DECODE = "decode"
MODES = {"forward": ("forward",), "train": ("train",), "both": ("forward", "train"), DECODE: (DECODE,)}
"""What is timed, by the word of `--mode`."""
CONTEXT = 2048
"""Tokens that decode steps find cached where nothing else is said."""


def decode_mode(context: int) -> str:
    """The mode, in reports, of decode steps that find so many tokens cached."""
    return f"{DECODE}-{context}"


def context_of(mode: str) -> int | None:
    """Its inverse; None for forward passes and training."""
    return int(mode.removeprefix(f"{DECODE}-")) if mode.startswith(DECODE) else None


@dataclass(frozen=True)
class Comparison:
    """Layouts of one model, the first one being the baseline.

    Args:
        contexts: tokens that decode steps find cached, one set of steps after the other.
    """

    model: str
    layouts: tuple[str, ...]
    modes: tuple[str, ...] = ("forward", "train")
    contexts: tuple[int, ...] = (CONTEXT,)


_BOTH_MOTIONS = (
    *(f"grid={grid},exchange=batch" for grid in ("8x2", "4x4")),
    *(f"grid={grid},exchange=weights" for grid in ("8x2", "4x4", "2x8", "1x16")),
)
_OTHERS = tuple(f"grid=4x4,exchange={exchange}" for exchange in ("sequence", "scores", "local"))
_PAPER = Comparison("paper-dense", ("tp=8,pp=2", "tp=16", *_BOTH_MOTIONS, *_OTHERS))
# Stock MoE runs under TP with sequence parallelism alone, so every Megatron layout has it.
_PAPER_MOE = Comparison(
    "paper-moe",
    (
        "tp=8,pp=2,sp,ep=8",
        "tp=8,pp=2,ep=8,moe=deepspeed",
        "tp=16,sp,ep=8",
        *(f"{layout},ep=8,moe=deepspeed" for layout in (*_BOTH_MOTIONS, *_OTHERS)),
    ),
)
_KV_HEADS = (
    Comparison("llama3-like", ("tp=16", "grid=8x2", "grid=8x2,exchange=sequence")),
    Comparison("qwen2.5-like", ("tp=8", "grid=2x4", "grid=2x4,exchange=sequence")),
    Comparison("qwen3-like", ("tp=8", "grid=4x2", "grid=4x2,exchange=sequence")),
    Comparison("mqa", ("tp=8", "grid=1x8", "grid=1x8,exchange=sequence")),
    Comparison("few-heads", ("grid=4x2", "tp=8", "tp=4,dp=2")),
)

# Prompts are cached, tokens are counted one at a time: no pipeline, since each would wait for the one before.
_SHORT_AND_LONG = (256, CONTEXT)
_PAPER_DECODE = Comparison(
    "paper-dense", ("tp=16", "grid=8x2", "grid=4x4", "grid=4x4,exchange=sequence"), (DECODE,), _SHORT_AND_LONG
)
_PAPER_MOE_DECODE = Comparison(
    "paper-moe",
    tuple(f"{layout},ep=8,moe=deepspeed" for layout in ("tp=16", "grid=8x2", "grid=4x4")),
    (DECODE,),
    _SHORT_AND_LONG,
)
_KV_HEADS_DECODE = tuple(replace(one, modes=(DECODE,), contexts=_SHORT_AND_LONG) for one in _KV_HEADS)
_DECODE = (
    Comparison("paper-dense", ("tp=16", "grid=8x2", "grid=4x4"), (DECODE,)),
    Comparison("qwen2.5-like", ("tp=8", "grid=2x4", "grid=2x4,exchange=sequence"), (DECODE,)),
    Comparison("mqa", ("tp=8", "grid=1x8", "grid=1x8,exchange=sequence"), (DECODE,)),
)

# What is chosen beside every exchange that could have been: few tokens in a micro-batch, and eight times as many.
_FEW_TOKENS = (",mbs=1", ",exchange=sequence,mbs=1", ",exchange=weights,mbs=1")
_MANY_TOKENS = (",mbs=8", ",exchange=batch,mbs=8", ",exchange=sequence,mbs=8", ",exchange=weights,mbs=8")
_AUTO = tuple(
    Comparison(model, tuple(f"grid={grid}{choice}" for choice in _FEW_TOKENS + _MANY_TOKENS))
    for model, grid in (("llama3-like", "2x2"), ("qwen2.5-like", "2x2"), ("qwen3-like", "2x2"), ("mqa", "1x4"))
)

SUITES: dict[str, tuple[Comparison, ...]] = {
    "paper-dense": (_PAPER,),
    "paper-moe": (_PAPER_MOE,),
    "kv-heads": _KV_HEADS,
    "decode": _DECODE,
    "auto": _AUTO,
    "all": (_PAPER, _PAPER_MOE, *_KV_HEADS),
}
DECODE_SUITES: dict[str, tuple[Comparison, ...]] = {
    "paper-dense": (_PAPER_DECODE,),
    "paper-moe": (_PAPER_MOE_DECODE,),
    "kv-heads": _KV_HEADS_DECODE,
    "decode": _DECODE,
    "all": (_PAPER_DECODE, _PAPER_MOE_DECODE, *_KV_HEADS_DECODE),
}
"""The same sets' layouts that decode."""
