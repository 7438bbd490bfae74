"""Whatever processes do to a cache in whatever order: nobody sees a value that was replaced longer than the bound.

A model in Python keeps all that each key has been, and when. Time stands still between the steps; when it passes, it
passes in Redis as well, where every TTL gets shorter by it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from math import inf
from typing import cast

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from cluster_tasks.cache import Cache, LocalCache, Memory, RedisCache, Refresh, TieredCache, coherence, share
from cluster_tasks.cache.connection import CacheConnection
from cluster_tasks.cache.counters import Counters
from cluster_tasks.clock import ManualClock
from cluster_tasks.keys import Keys
from cluster_tasks.redis_store import connect
from workers.redis_server import RedisServer

NAMES = ["a1", "a2", "b1"]
PROCESSES = 3
STALENESS_S = 20.0
"""A multiple of the steps of time, and no TTL is one: else chance would tell what comes first at an instant."""
TTLS_S = [15.0, 25.0, 105.0, 1005.0]
KEYS = st.sampled_from(NAMES)
PROCESS = st.integers(0, PROCESSES - 1)
TTL = st.sampled_from(TTLS_S)
PATTERNS = {"*": NAMES, "a*": ["a1", "a2"], "[ab]1": ["a1", "b1"], "c*": []}


@dataclass(frozen=True)
class Was:
    """What a key was from some time on."""

    since_s: float
    by: int
    values: frozenset[tuple[bytes | None, float]]
    """With when they are no longer fresh; more than one if a value may have been void from the beginning."""


class Processes(RuleBasedStateMachine):
    """What processes do to one namespace."""

    def __init__(self, make: Callable[[ManualClock, ExitStack], list[Cache]], url: str | None, bound_s: float) -> None:
        super().__init__()
        self.clock, self.closing = ManualClock(1000.0), ExitStack()
        self.redis = self.closing.enter_context(closing(connect(url))) if url else None
        if self.redis is not None:
            self.redis.flushall()
        self.caches, self.bound_s = make(self.clock, self.closing), bound_s
        self.was = {key: [Was(-inf, -1, frozenset({(None, inf)}))] for key in NAMES}
        self.voided: list[tuple[float, int]] = []
        """When all was made void, and by whom; -1: by nobody of them."""
        self.made = 0

    def teardown(self) -> None:
        try:
            self.all_get()
        finally:
            self.closing.close()

    @rule(process=PROCESS, other=PROCESS, keys=st.permutations(NAMES))
    def change_after_a_change_of_another(self, process: int, other: int, keys: list[str]) -> None:
        """Who hears only of the second must not take it for the only one."""
        self.all_get()
        self.all_get()
        self.set(other, keys[0], 1005.0)
        self.set(process, keys[1], 1005.0)
        self.pass_time(STALENESS_S)
        self.all_get()

    # The model.

    def now(self) -> float:
        return self.clock.monotonic()

    def new_value(self) -> bytes:
        self.made += 1
        return b"v%d" % self.made

    def note(self, process: int, key: str, value: bytes | None, ttl_s: float = inf) -> None:
        values = {(value, self.now() + ttl_s)}
        if self.may_not_know(process):
            values.add((None, inf))
        self.was[key].append(Was(self.now(), process, frozenset(values)))

    def may_not_know(self, process: int) -> bool:
        """Whether all was made void, of which this process may not have heard yet."""
        return any(by != process and self.now() - at_s < self.bound_s for at_s, by in self.voided)

    def allowed(self, process: int, key: str) -> set[bytes | None]:
        """What a process may be shown."""
        past, seen = self.was[key], set[bytes | None]()
        for index in range(len(past) - 1, -1, -1):
            seen |= {value if until_s > self.now() else None for value, until_s in past[index].values}
            # Nobody is shown less than what he did himself.
            if past[index].by == process or self.now() - past[index].since_s >= self.bound_s:
                break
        return seen

    # The steps.

    @rule(process=PROCESS, key=KEYS, ttl_s=TTL)
    def set(self, process: int, key: str, ttl_s: float) -> None:
        value = self.new_value()
        assert self.cache(process).set(key, value, ttl_s)
        self.note(process, key, value, ttl_s)

    @rule(process=PROCESS, ttl_s=TTL)
    def set_many(self, process: int, ttl_s: float) -> None:
        values = {key: self.new_value() for key in NAMES}
        assert self.cache(process).set_many(values, ttl_s)
        for key, value in values.items():
            self.note(process, key, value, ttl_s)

    @rule(process=PROCESS, key=KEYS)
    def get(self, process: int, key: str) -> None:
        found = self.cache(process).get(key)
        assert found in self.allowed(process, key)

    @rule(process=PROCESS)
    def get_many(self, process: int) -> None:
        found = self.cache(process).get_many(NAMES)
        for key in NAMES:
            assert found.get(key) in self.allowed(process, key)

    # Thrice: what is wrong shows to those who had read before something changed, and read again when time has passed.

    @rule()
    def all_get(self) -> None:
        for process in range(len(self.caches)):
            for key in NAMES:
                self.get(process, key)

    @rule()
    def all_get_many(self) -> None:
        for process in range(len(self.caches)):
            self.get_many(process)

    @rule(seconds=st.sampled_from([10.0, 20.0, 30.0]))
    def all_get_before_and_after_a_while(self, seconds: float) -> None:
        self.all_get_many()
        self.pass_time(seconds)
        self.all_get()

    @rule(process=PROCESS, key=KEYS)
    def delete(self, process: int, key: str) -> None:
        self.cache(process).delete(key)
        self.note(process, key, None)

    @rule(process=PROCESS, key=KEYS, ttl_s=TTL)
    def expire(self, process: int, key: str, ttl_s: float) -> None:
        allowed = self.allowed(process, key)
        if not self.cache(process).expire(key, ttl_s):
            assert None in allowed
            return
        assert allowed - {None}
        for value, until_s in self.was[key][-1].values:
            if value is not None and until_s > self.now():
                self.note(process, key, value, ttl_s)
                break

    @rule(process=PROCESS, pattern=st.sampled_from(sorted(PATTERNS)))
    def clear(self, process: int, pattern: str) -> None:
        self.cache(process).clear(pattern)
        for key in PATTERNS[pattern]:
            self.note(process, key, None)

    @rule(process=PROCESS)
    def invalidate(self, process: int) -> None:
        self.cache(process).invalidate()
        self.void(process)

    @rule(process=PROCESS, key=KEYS, ttl_s=TTL)
    def compute(self, process: int, key: str, ttl_s: float) -> None:
        allowed, computed = self.allowed(process, key), []

        def compute() -> bytes:
            computed.append(self.new_value())
            return computed[0]

        found = self.cache(process).get_or_compute(key, compute, ttl_s, refresh=Refresh.NEVER)
        if computed:
            assert (found, None in allowed) == (computed[0], True)
            self.note(process, key, found, ttl_s)
        else:
            assert found in allowed - {None}

    @rule(process=PROCESS, other=PROCESS, key=KEYS, what=st.sampled_from(["set", "delete", "clear", "invalidate"]))
    def compute_while_another_acts(self, process: int, other: int, key: str, what: str) -> None:
        """What is computed from what has changed since is not kept."""
        allowed, computed = self.allowed(process, key), []

        def compute() -> bytes:
            computed.append(self.new_value())
            if what == "invalidate":
                # As if it had been stored just before.
                self.note(process, key, computed[0], 1005.0)
                self.invalidate(other)
            elif what == "set":
                self.set(other, key, 105.0)
            elif what == "clear":
                self.clear(other, "*")
            else:
                self.delete(other, key)
            return computed[0]

        found = self.cache(process).get_or_compute(key, compute, 1005.0, refresh=Refresh.NEVER)
        assert found in (computed or allowed - {None})

    @rule(seconds=st.sampled_from([10.0, 10.0, 20.0, 100.0, 1000.0]))
    def pass_time(self, seconds: float) -> None:
        self.clock.advance(seconds)
        if self.redis is not None:
            for key in self.redis.scan_iter(count=1000):
                left_ms = cast(int, self.redis.pttl(key))
                if left_ms > 0:
                    self.redis.pexpire(key, left_ms - round(seconds * 1000))

    @rule()
    def lose_the_state(self) -> None:
        """As a Redis does that needs the room."""
        if self.redis is not None and self.redis.delete(Keys().cache_state("test")):
            self.void(-1)

    def void(self, process: int) -> None:
        for key in NAMES:
            self.was[key].append(Was(self.now(), process, frozenset({(None, inf)})))
        self.voided.append((self.now(), process))

    def cache(self, process: int) -> Cache:
        return self.caches[process % len(self.caches)]


def in_redis(url: str, *, staleness_s: float, is_tiered: bool, hears: bool) -> Callable[..., list[Cache]]:
    """How to make the caches of some processes; one that does not ``hear`` gets no message of the others."""

    def make(clock: ManualClock, stack: ExitStack) -> list[Cache]:
        made: list[Cache] = []
        for _ in range(PROCESSES):
            counters = Counters()
            connection = stack.enter_context(closing(CacheConnection(url, clock, timeout_s=30.0)))
            keys = Keys()
            shared = share(connection, keys, clock, counters)
            stack.callback(shared.coherence.close)
            cache = RedisCache(shared, "test", staleness_s=staleness_s)
            made.append(TieredCache(Memory(clock, counters), cache) if is_tiered else cache)
            if not hears:
                shared.coherence._listen = lambda: None  # type: ignore[method-assign]
        return made

    return make


def run(make: Callable[[ManualClock, ExitStack], list[Cache]], url: str | None, bound_s: float) -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        lambda: Processes(make, url, bound_s),
        settings=settings(
            max_examples=60,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            # To shrink a failure takes longer than a test may.
            phases=[Phase.reuse, Phase.generate],
        ),
    )


def test_a_cache_in_the_process() -> None:
    def make(clock: ManualClock, stack: ExitStack) -> list[Cache]:
        return [LocalCache(Memory(clock, Counters()), "test")]

    run(make, None, 0.0)


@pytest.mark.parametrize("is_tiered", [False, True], ids=["redis", "tiered"])
@pytest.mark.parametrize("hears", [True, False], ids=["hearing", "deaf"])
def test_what_was_replaced_is_seen_no_longer_than_the_bound(
    redis_server: RedisServer, is_tiered: bool, hears: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coherence, "LISTEN_S", 0.01)  # Each example waits for the end of its listeners.
    make = in_redis(redis_server.url, staleness_s=STALENESS_S, is_tiered=is_tiered, hears=hears)
    run(make, redis_server.url, STALENESS_S)


def test_with_a_bound_of_0_nobody_sees_what_was_replaced(redis_server: RedisServer) -> None:
    make = in_redis(redis_server.url, staleness_s=0.0, is_tiered=False, hears=False)
    run(make, redis_server.url, 0.0)
