"""The exchanges' torch halves by name; the other halves are in `hp_plugin.exchange.rules`."""

from __future__ import annotations

from hp_plugin.exchange.batch.strategy import BatchExchange
from hp_plugin.exchange.local.strategy import LocalExchange
from hp_plugin.exchange.scores.strategy import ScoresExchange
from hp_plugin.exchange.sequence.strategy import SequenceExchange
from hp_plugin.exchange.strategy import Exchange
from hp_plugin.exchange.weights.strategy import WeightsExchange

STRATEGIES: dict[str, type[Exchange]] = {
    strategy.rule.name: strategy
    for strategy in (BatchExchange, SequenceExchange, ScoresExchange, WeightsExchange, LocalExchange)
}
