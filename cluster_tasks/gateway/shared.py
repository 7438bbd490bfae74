"""The breaker and the limits of one provider, in Redis: what one node learns, all know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import redis

from cluster_tasks.breaker import BreakerPolicy, BreakerState, Outcome, Permit, Phase
from cluster_tasks.errors import BrokerUnavailable, CircuitOpen, ProviderLimited
from cluster_tasks.keys import Keys
from cluster_tasks.redis_store import foreign_errors, load_script, run_script, text


@dataclass(frozen=True, slots=True)
class Limits:
    """What a provider may be sent by the whole cluster in any minute; 0: as much as there is."""

    requests: int = 0
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Admission:
    """A request was let through."""

    permit: Permit
    wait_s: float = 0.0
    """So long it has to wait for its turn."""
    second: str = ""
    """Of Redis' clock, for which it was counted; empty: it was not."""
    tokens: int = 0
    """So many were counted."""


class SharedBreaker:
    """Asks before each request and tells after it, each in one round trip. Raises BrokerUnavailable.

    Redis' own clock decides. A reply that was lost is not asked for again: then a probe's place or a request's share
    of the limits stays taken until its time runs out.
    """

    def __init__(
        self,
        client: redis.Redis,
        keys: Keys,
        provider: str,
        policy: BreakerPolicy,
        limits: Limits,
        longest_wait_s: float,
    ) -> None:
        self._client, self._provider, self._policy, self._limits = client, provider, policy, limits
        self._longest_wait_s = longest_wait_s
        self._keys, self._counts = [keys.breaker(provider), keys.limits(provider)], keys.provider_counts
        self._admit, self._record = (load_script(client, __package__, name) for name in ("admit", "record"))

    def admit(self, tokens: int) -> Admission:
        """Let a request that may take so many tokens through. Raises CircuitOpen and ProviderLimited."""
        policy, limits = self._policy, self._limits
        with foreign_errors(BrokerUnavailable, f"asking for the breaker of {self._provider}"):
            answer, *facts = run_script(
                self._client, self._admit, self._keys,
                [policy.timeout_s, policy.success_threshold, policy.probe_lease_s, limits.requests, limits.tokens,
                 tokens, self._longest_wait_s],
            )  # fmt: skip
        if answer == b"open":
            raise CircuitOpen(f"{self._provider} is not asked: it failed too often", float(facts[0]))
        if answer == b"limited":
            raise ProviderLimited(f"{self._provider} is not asked: its limits are used up", float(facts[0]))
        generation, lease, wait_s, second = facts
        permit = Permit(int(generation), float(lease) if lease else None)
        return Admission(permit, float(wait_s), text(second), tokens)

    def record(self, admission: Admission, outcome: Outcome, tokens: int | None) -> Phase | None:
        """Tell how the request ended, and the tokens it took if that is known. Returns the news, as ``news`` does."""
        policy, permit = self._policy, admission.permit
        more = 0 if tokens is None else tokens - admission.tokens
        lease = "" if permit.lease_until_s is None else f"{permit.lease_until_s:.3f}"
        with foreign_errors(BrokerUnavailable, f"telling the breaker of {self._provider}"):
            told = run_script(
                self._client, self._record, [*self._keys, self._counts],
                [outcome, permit.generation, lease, policy.failure_threshold, policy.success_threshold, policy.window,
                 policy.window_s, policy.minimum_volume, admission.second, more, self._provider],
            )  # fmt: skip
        return Phase(text(told)) if told else None

    def state(self) -> BreakerState:
        """What the cluster knows of the provider now; its times are those of Redis' clock."""
        with foreign_errors(BrokerUnavailable, f"reading the breaker of {self._provider}"):
            found: Any = self._client.get(self._keys[0])
        return BreakerState.from_json(found or "{}")
