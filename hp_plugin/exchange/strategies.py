"""Exchange strategies by name; the shapes they carry are decided in `hp_plugin.exchange_rules`."""

from __future__ import annotations

from hp_plugin.exchange.base import QKV, Angles, CoreSettings, Exchange, QKVLayout, Turn
from hp_plugin.exchange.batch import BatchExchange
from hp_plugin.exchange.local import LocalExchange
from hp_plugin.exchange.scores import ScoresExchange
from hp_plugin.exchange.sequence import SequenceExchange

STRATEGIES: dict[str, type[Exchange]] = {
    strategy.name: strategy for strategy in (BatchExchange, SequenceExchange, ScoresExchange, LocalExchange)
}

__all__ = ["QKV", "STRATEGIES", "Angles", "CoreSettings", "Exchange", "QKVLayout", "Turn"]
