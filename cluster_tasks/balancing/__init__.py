"""Strategies for choosing a node: one seam, ``base.Balancer``, its five implementations, and those of users."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from cluster_tasks.balancing.adaptive import Adaptive
from cluster_tasks.balancing.base import Balancer
from cluster_tasks.balancing.consistent_hash import ConsistentHash
from cluster_tasks.balancing.least_connection import LeastConnection
from cluster_tasks.balancing.round_robin import RoundRobin
from cluster_tasks.balancing.weighted import Weighted
from cluster_tasks.clock import Clock
from cluster_tasks.errors import ConfigurationError, did_you_mean

__all__ = [
    "Adaptive",
    "Balancer",
    "BalancerContext",
    "BalancerFactory",
    "ConsistentHash",
    "LeastConnection",
    "RoundRobin",
    "Weighted",
    "create_balancer",
    "register_strategy",
    "strategy_names",
]


@dataclass(frozen=True, slots=True)
class BalancerContext:
    """What a strategy may build on."""

    clock: Clock
    rng: Random
    virtual_nodes: int = 160
    """Points of each node on a hash ring."""


BalancerFactory = Callable[[BalancerContext], Balancer]

_factories: dict[str, BalancerFactory] = {
    "round_robin": lambda _: RoundRobin(),
    "least_connection": lambda context: LeastConnection(context.rng),
    "weighted": lambda _: Weighted(),
    "consistent_hash": lambda context: ConsistentHash(context.rng, context.virtual_nodes),
    "adaptive": lambda context: Adaptive(context.clock, context.rng),
}


def register_strategy(name: str, factory: BalancerFactory) -> None:
    """Make ``name`` a strategy that the settings can choose. Every call of ``factory`` must return a new balancer.

    Safe to repeat with the same factory. Raises ConfigurationError if another one has the name.
    """
    if _factories.setdefault(name, factory) is not factory:
        raise ConfigurationError(f"a strategy named {name!r} is registered already")


def strategy_names() -> tuple[str, ...]:
    """The names of all strategies, sorted."""
    return tuple(sorted(_factories))


def create_balancer(name: str, *, clock: Clock, rng: Random, virtual_nodes: int = 160) -> Balancer:
    """Return a new balancer of the strategy ``name``. Raises ConfigurationError if there is none of that name."""
    factory = _factories.get(name)
    if factory is None:
        raise ConfigurationError(
            f"strategy {name!r} is unknown{did_you_mean(name, _factories)};"
            f" expected one of {', '.join(strategy_names())}"
        )
    return factory(BalancerContext(clock, rng, virtual_nodes))
