"""The exchanges by name, and what `auto` makes of a shape; no torch."""

from __future__ import annotations

from dataclasses import dataclass

from hp_plugin.exchange.batch.rule import BatchRule
from hp_plugin.exchange.local.rule import LocalRule
from hp_plugin.exchange.rule import AttentionShape, BlockShape, ExchangeRule
from hp_plugin.exchange.scores.rule import ScoresRule
from hp_plugin.exchange.sequence.rule import SequenceRule
from hp_plugin.exchange.weights.rule import WeightsRule
from hp_plugin.refusal import RefusedError

RULES: dict[str, ExchangeRule] = {
    rule.name: rule for rule in (BatchRule(), SequenceRule(), ScoresRule(), WeightsRule(), LocalRule())
}
AUTO = "auto"
"""The choice that is left to each micro-batch's shape."""
AUTO_ORDER = ("batch", "sequence", "scores")
"""What `auto` tries, cheapest first."""
IDENTITY = "batch"
"""What runs where there is one slice: nothing is exchanged then, whatever the name."""

EXCHANGES = (*RULES, AUTO)


def candidates(exchange: str, n: int) -> tuple[str, ...]:
    """The exchanges that a layer with n slices may have to run under this choice."""
    if n == 1:
        return (IDENTITY,)
    return AUTO_ORDER if exchange == AUTO else (exchange,)


def resolve(exchange: str, shape: AttentionShape) -> str:
    """The exchange that `exchange` stands for at this shape.

    Raises:
        RefusedError: none that it stands for can carry the shape; says why, and which exact ones can.
    """
    if shape.n == 1:
        return IDENTITY
    refusals = []
    for name in candidates(exchange, shape.n):
        refusal = RULES[name].refusal(shape)
        if refusal is None:
            return name
        refusals.append(refusal)
    raise RefusedError(refusals, "exchange ", way_out(fitting(shape)))


@dataclass(frozen=True)
class Counted:
    """Bytes that a rank sends while one micro-batch passes a block, by exchange, fewest first; those that fit."""

    bytes: dict[str, float]

    @property
    def name(self) -> str:
        """The exchange that sends fewest."""
        return next(iter(self.bytes))

    @property
    def reason(self) -> str:
        """What each sends, for people."""
        return ", ".join(f"{name} {sent / 1e6:,.1f} MB" for name, sent in self.bytes.items())


def count(block: BlockShape, training: bool, itemsize: int = 2) -> Counted:
    """What every exact exchange that can carry this block sends in one pass, forward only or `training`.

    Depends on nothing that differs between ranks. Of equals the first of `RULES` comes first.

    Raises:
        RefusedError: none can carry it.
    """
    shape = block.attention
    if shape.n == 1:
        return Counted({IDENTITY: RULES[IDENTITY].pass_bytes(block, itemsize, training)})
    refusals = {name: rule.refusal(shape) for name, rule in RULES.items() if rule.exact}
    sent = {
        name: RULES[name].pass_bytes(block, itemsize, training) for name, refused in refusals.items() if refused is None
    }
    if not sent:
        raise RefusedError([refused for refused in refusals.values() if refused is not None], "exchange ")
    return Counted(dict(sorted(sent.items(), key=lambda one: one[1])))


def fitting(shape: AttentionShape) -> list[str]:
    """The exact exchanges that can carry this shape, cheapest first."""
    return [name for name in AUTO_ORDER if RULES[name].refusal(shape) is None]


def way_out(names: list[str], condition: str = "") -> str:
    """Names of exchanges that were found fit, as the end of a refusal; empty if there are none."""
    return f"; --head-dim-exchange {' or '.join(names)} can{condition}" if names else ""
