"""The exchanges by name, and what `auto` makes of a shape; no torch."""

from __future__ import annotations

from hp_plugin.exchange.batch.rule import BatchRule
from hp_plugin.exchange.local.rule import LocalRule
from hp_plugin.exchange.rule import AttentionShape, ExchangeRule
from hp_plugin.exchange.scores.rule import ScoresRule
from hp_plugin.exchange.sequence.rule import SequenceRule

RULES: dict[str, ExchangeRule] = {rule.name: rule for rule in (BatchRule(), SequenceRule(), ScoresRule(), LocalRule())}
AUTO_ORDER = ("batch", "sequence", "scores")
"""What `auto` tries, cheapest first."""

EXCHANGES = (*RULES, "auto")


def resolve(exchange: str, shape: AttentionShape) -> str:
    """The exchange that `exchange` stands for at this shape; raises ValueError if it cannot carry it."""
    candidates = AUTO_ORDER if exchange == "auto" else (exchange,)
    reasons = {name: RULES[name].missing(shape) for name in candidates}
    for name, reason in reasons.items():
        if reason is None:
            return name
    fitting = [name for name in AUTO_ORDER if RULES[name].missing(shape) is None]
    way_out = f"; --head-dim-exchange {' or '.join(fitting)} can" if fitting else ""
    said = "; ".join(f"`{name}` {reason}" for name, reason in reasons.items())
    raise ValueError(f"exchange {said}{way_out}")
