"""A parallel layout: how the ranks divide the model and the batch, read from and written as `tp=8,pp=2,...`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from difflib import get_close_matches

from hp_plugin.config import HeadDimConfig
from hp_plugin.exchange.rules import AUTO
from hp_plugin.grid.ranks import DIM_INNERMOST, HEAD_INNERMOST
from hp_plugin.refusal import shown

RECOMPUTE = ("none", "selective", "full")
ZERO = ("replicated", "optimizer", "full")
MAX_SIZE = 2**20
"""Ranks of an axis, or sequences in a micro-batch, beyond which a number is taken for a typing error."""
MOE_BACKENDS = ("megatron", "deepspeed")
SERVED = ("dcp", "kvp", "adp")
"""How servers spread attention over more tensor-parallel ranks than there are key/value heads, when they decode."""


@dataclass(frozen=True)
class Layout:
    """One way to spread a model over ranks; world size = tp · pp · cp · dp.

    Args:
        tp: tensor-parallel size; with `grid`, m · n.
        grid: the m × n grid of attention, or None for stock attention.
        vpp: virtual pipeline stages per rank. dp: data-parallel size. cp: context-parallel size.
        ep: ranks over which a MoE layer's experts are spread. moe: whose MoE layer.
        sp: Megatron's sequence parallelism. tp_overlap: its `--tp-comm-overlap` (Transformer Engine).
        micro_batch: sequences per micro-batch.
        recompute: activations computed again in backward (`selective`: core attention, `full`: whole layers).
        zero: what data parallelism shards: nothing, the optimizer (Megatron's distributed optimizer, ZeRO-1), or
            everything (FSDP, ZeRO-3).
        dcp: ranks that share a head's cache by tokens, each with its own query heads (decode context parallelism of
            vLLM and SGLang). kvp: the same where each has the query heads of all of them (Helix). adp: ranks that share
            it by sequences, with attention's weights whole on each (attention data parallelism). Stock attention alone.
        kv_pieces: where a cache is spread by tokens, parts of a micro-batch's sequences that follow each other, each
            part's trade of partial outputs beside the next one's attention (Helix's batch-wise overlap,
            arXiv:2507.07120); 1: nothing runs beside the trade, as in the plugin.
        gtp: data-parallel ranks over which every linear's weight is spread and gathered for each use (GTP of
            Megatron-Core 0.19, `--tensor-parallel-num-weight-shards` TP·gtp). cp_heads: context-parallel ranks that
            trade tokens for heads (`a2a+p2p`, or `a2a` where it is all of them); the ring goes around the rest. Stock
            attention alone.
        fused: whether the norm, bias and activation kernels are fused (Megatron with Transformer Engine) or not.

    Raises:
        ValueError: a size that is not positive or an unknown word.
    """

    tp: int = 1
    grid: HeadDimConfig | None = None
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    dp: int = 1
    ep: int = 1
    sp: bool = False
    tp_overlap: bool = False
    micro_batch: int = 1
    recompute: str = "none"
    zero: str = "optimizer"
    moe: str = "megatron"
    fused: bool = True
    dcp: int = 1
    kvp: int = 1
    adp: int = 1
    gtp: int = 1
    cp_heads: int = 1
    kv_pieces: int = 1

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "vpp", "cp", "dp", "ep", "micro_batch", *SERVED, "gtp", "cp_heads", "kv_pieces"):
            value = getattr(self, name)
            if not 1 <= value <= MAX_SIZE:
                said = "at least 1" if value < 1 else f"at most {MAX_SIZE:,}"
                raise ValueError(f"layout: {name} must be {said}, got {shown(value)}")
        for name, words in (("recompute", RECOMPUTE), ("zero", ZERO), ("moe", MOE_BACKENDS)):
            if getattr(self, name) not in words:
                raise ValueError(f"layout: {name} must be one of {', '.join(words)}, got {shown(getattr(self, name))}")
        if self.grid is not None and self.grid.size != self.tp:
            raise ValueError(f"layout: grid {self.grid.m}x{self.grid.n} makes tp={self.grid.size}, not {self.tp}")
        served = [f"{name}={getattr(self, name)}" for name in SERVED if getattr(self, name) > 1]
        if len(served) > 1 or (served and self.grid is not None):
            others = " and ".join([*served, *(["grid"] if self.grid else [])])
            raise ValueError(f"layout: {others} spread attention in different ways: give one of them")
        for name, whole in (("gtp", "dp"), ("cp_heads", "cp")):
            if getattr(self, whole) % getattr(self, name) and getattr(self, whole) > 1:
                said = f"{name}={getattr(self, name)} does not divide {whole}={getattr(self, whole)}"
                raise ValueError(f"layout: {said}")
        if self.tp % self.shared:
            raise ValueError(f"layout: {served[0]} does not divide tp={self.tp}")

    @property
    def shared(self) -> int:
        """Ranks that share one cache in a server's way; 1 in others."""
        return self.dcp * self.kvp * self.adp

    @property
    def world(self) -> int:
        """Ranks."""
        return self.tp * self.pp * self.cp * self.dp

    @property
    def exact(self) -> bool:
        """Whether it computes the model's own attention (`local` does not)."""
        return self.grid is None or self.grid.exact

    @property
    def replicas(self) -> int:
        """Ranks that hold the same parameters, but for experts: over these gradients are reduced."""
        return self.dp * self.cp

    @property
    def expert_replicas(self) -> int:
        """Ranks that hold the same experts."""
        return max(1, self.tp * self.cp * self.dp // self.ep)

    @property
    def m(self) -> int:
        """Size of the head axis; without a grid tp, or what is left of it by ranks that share a cache."""
        return self.grid.m if self.grid else self.tp // self.shared

    @property
    def n(self) -> int:
        """Size of the dim axis; without a grid ranks that share a cache, 1 where none do."""
        return self.grid.n if self.grid else self.shared

    @property
    def exchange(self) -> str:
        """What is asked for between the ranks of the dim axis; empty where there is none (no grid, or n = 1)."""
        return self.grid.exchange if self.grid is not None and self.grid.n > 1 else ""

    @property
    def order(self) -> str:
        """Which axis of the grid has neighbouring ranks; with attention data parallelism those that split heads."""
        return self.grid.grid.order if self.grid else HEAD_INNERMOST if self.adp > 1 else DIM_INNERMOST

    @property
    def stages(self) -> int:
        """Virtual stages in all."""
        return self.pp * self.vpp

    @property
    def kind(self) -> str:
        """What sort of layout this is, for tables of the best of each."""
        name = f"grid {self.grid.m}x{self.grid.n} {self.grid.exchange}" if self.grid else f"stock TP={self.tp}"
        name += "".join(f" {axis.upper()}={getattr(self, axis)}" for axis in SERVED if getattr(self, axis) > 1)
        return name + (f" PP={self.pp}" if self.pp > 1 else "") + (f" CP={self.cp}" if self.cp > 1 else "")

    def __str__(self) -> str:
        parts = [f"grid={self.grid.m}x{self.grid.n},exchange={self.grid.exchange}" if self.grid else f"tp={self.tp}"]
        parts += [f"order={self.order}"] if self.grid and self.order != DIM_INNERMOST else []
        parts += [f"{name}={getattr(self, name)}" for name in SERVED if getattr(self, name) > 1]
        default = Layout()
        for name, value in (
            ("pp", self.pp), ("vpp", self.vpp), ("cp", self.cp), ("dp", self.dp), ("ep", self.ep),
            ("gtp", self.gtp), ("cp_heads", self.cp_heads), ("kv_pieces", self.kv_pieces), ("mbs", self.micro_batch),
        ):  # fmt: skip
            if value != 1 or name == "mbs":
                parts.append(f"{name}={value}")
        parts += [flag for flag in ("sp", "tp_overlap") if getattr(self, flag)]
        parts += [
            f"{name}={getattr(self, name)}"
            for name in ("recompute", "zero")
            if getattr(self, name) != getattr(default, name)
        ]
        if self.ep > 1:
            parts.append(f"moe={self.moe}")
        if not self.fused:
            parts.append("fused=off")
        return ",".join(parts)

    @classmethod
    def parse(cls, text: str, world: int | None = None) -> Layout:
        """Reads `tp=8,pp=2,mbs=4,sp` or `grid=4x4,exchange=batch`; dp fills `world` if it is not given.

        A grid's exchange and the order of its ranks (`order=head-innermost`) may be left out.

        Raises:
            ValueError: an unknown key, a malformed value, or sizes that do not divide the world.
        """
        given: dict[str, str] = {}
        for part in filter(None, (piece.strip() for piece in text.split(","))):
            key, equals, value = part.partition("=")
            key = "micro_batch" if key == "mbs" else key
            if key not in _KEYS:
                near = get_close_matches(key, _KEYS, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ValueError(f"layout {shown(text)}: unknown key {shown(key)}{hint}")
            if key in given:
                raise ValueError(f"layout {shown(text)}: {key} is given twice")
            given[key] = value if equals else "on"
        grid = _grid(text, given)
        values: dict[str, object] = {}
        for key, value in given.items():
            if key in ("sp", "tp_overlap", "fused"):
                values[key] = _switch(text, key, value)
            elif key in ("recompute", "zero", "moe"):
                values[key] = value
            else:
                values[key] = _integer(text, key, value)
        if grid is not None:
            if values.get("tp", grid.size) != grid.size:
                raise ValueError(
                    f"layout {shown(text)}: grid {grid.m}x{grid.n} makes tp={grid.size}, not {values['tp']}"
                )
            values["tp"], values["grid"] = grid.size, grid
        layout = cls(**values)  # type: ignore[arg-type]
        if world is None:
            return layout
        if "dp" not in given:
            model = layout.tp * layout.pp * layout.cp
            if world % model:
                raise ValueError(
                    f"layout {shown(text)} takes a multiple of tp·pp·cp = {model} GPUs, and {world} is none"
                )
            return cls(**{**values, "dp": world // model})  # type: ignore[arg-type]
        if layout.world != world:
            raise ValueError(f"layout {shown(text)} takes tp·pp·cp·dp = {layout.world} GPUs, not {world}")
        return layout


_KEYS = {field.name for field in fields(Layout)} | {"exchange", "order"}


def _grid(text: str, given: dict[str, str]) -> HeadDimConfig | None:
    exchange, order = given.pop("exchange", None), given.pop("order", None)
    shape = given.pop("grid", None)
    if shape is None:
        for key, value in (("exchange", exchange), ("order", order)):
            if value is not None:
                raise ValueError(f"layout {shown(text)}: {key}={shown(value)[1:-1]} needs grid=MxN")
        return None
    m, times, n = shape.partition("x")
    if not (times and m.isdigit() and n.isdigit()):
        raise ValueError(f"layout {shown(text)}: grid takes MxN, for example 4x4, got {shown(shape)}")
    return HeadDimConfig(int(m), int(n), exchange or AUTO, order or DIM_INNERMOST)


def _integer(text: str, key: str, value: str) -> int:
    try:
        return int(value)
    except ValueError:
        name = "mbs" if key == "micro_batch" else key
        raise ValueError(f"layout {shown(text)}: {name} takes an integer, got {shown(value)}") from None


def _switch(text: str, key: str, value: str) -> bool:
    if value not in ("on", "off"):
        raise ValueError(f"layout {shown(text)}: {key} takes on or off, got {shown(value)}")
    return value == "on"
