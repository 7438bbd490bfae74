"""What each request to a provider passes: its breaker and limits; without Redis, a breaker of this process."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from time import sleep
from typing import Protocol, TypeVar

import redis

from cluster_tasks import tracing
from cluster_tasks.breaker import Breaker, BreakerPolicy, Outcome, Phase
from cluster_tasks.clock import Clock
from cluster_tasks.errors import BrokerUnavailable, CircuitOpen, ProviderError, ProviderUnavailable
from cluster_tasks.gateway.shared import Admission, Limits, SharedBreaker
from cluster_tasks.keys import Keys

logger = logging.getLogger(__name__)

ALONE_S = 5.0
"""So long a process asks its own breaker, after Redis did not answer."""
LONGEST_REASON = 300
"""Characters of an error in an event: some gateways answer with whole pages."""
T = TypeVar("T")


class Tell(Protocol):
    """Writes an event of the cluster."""

    def __call__(self, kind: str, **facts: object) -> None:
        """Never raises for want of Redis."""


@dataclass(frozen=True, slots=True)
class Neighbourhood:
    """What the guards of all providers share."""

    client: redis.Redis
    """With short time-outs: a job waits for it."""
    keys: Keys
    clock: Clock
    tell: Tell


class Guard:
    """Lets requests through to one provider, or not. Safe to share between threads."""

    def __init__(
        self, around: Neighbourhood, provider: str, policy: BreakerPolicy, limits: Limits, longest_wait_s: float
    ) -> None:
        self._provider, self._policy, self._clock, self._tell = provider, policy, around.clock, around.tell
        self._shared = SharedBreaker(around.client, around.keys, provider, policy, limits, longest_wait_s)
        self._own = Breaker(policy, around.clock)
        self._alone_until_s = float("-inf")

    def send(self, request: Callable[[], T], tokens: int, taken: Callable[[T], int]) -> T:
        """Return what ``request`` returns, once it is its turn.

        ``tokens`` are those that it may take, ``taken`` tells from the reply those that it took; 0: unknown. Raises
        CircuitOpen and ProviderLimited without sending it, and what ``request`` raises: ProviderUnavailable alone
        counts against the provider, ProviderError says that it is there.
        """
        with tracing.calling(self._provider):
            return self._send(request, tokens, taken)

    def _send(self, request: Callable[[], T], tokens: int, taken: Callable[[T], int]) -> T:
        admission, shared = self._admit(tokens)
        outcome, used, reason = Outcome.UNKNOWN, None, ""
        try:
            sleep(admission.wait_s)
            reply = request()
            outcome, used = Outcome.SUCCESS, taken(reply) or None
        except ProviderUnavailable as exc:
            outcome, reason = Outcome.FAILURE, str(exc)[:LONGEST_REASON]
            raise
        except ProviderError:
            outcome = Outcome.SUCCESS
            raise
        finally:
            self._record(admission, shared, outcome, used, reason)
        return reply

    def _admit(self, tokens: int) -> tuple[Admission, bool]:
        if self._clock.monotonic() >= self._alone_until_s:
            try:
                return self._shared.admit(tokens), True
            except BrokerUnavailable as exc:
                self._stay_alone(exc)
        permit = self._own.admit()
        if permit is None:
            raise CircuitOpen(f"{self._provider} is not asked: it failed too often", self._own.wait_s())
        return Admission(permit), False

    def _record(self, admission: Admission, shared: bool, outcome: Outcome, tokens: int | None, reason: str) -> None:
        try:
            if shared:
                news = self._shared.record(admission, outcome, tokens)
            else:
                news = self._own.record(admission.permit, outcome)
        except BrokerUnavailable as exc:
            self._stay_alone(exc)
            return
        if news is Phase.OPEN:
            logger.warning("breaker open: %s: %s", self._provider, reason, extra={"provider": self._provider})
            self._tell("breaker open", provider=self._provider, reason=reason, timeout_s=self._policy.timeout_s)
        elif news is Phase.CLOSED:
            logger.info("breaker closed: %s", self._provider, extra={"provider": self._provider})
            self._tell("breaker closed", provider=self._provider)

    def _stay_alone(self, exc: BrokerUnavailable) -> None:
        self._alone_until_s = self._clock.monotonic() + ALONE_S
        logger.warning("the breaker of %s is not shared for %g s: %s", self._provider, ALONE_S, exc)
