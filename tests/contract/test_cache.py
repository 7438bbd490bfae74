"""What every cache promises: in the process, in Redis, in a Redis Cluster, and in two tiers."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from secrets import token_hex
from typing import Any

import numpy as np
import pytest

from cluster_tasks.cache import (
    Cache,
    Entry,
    LocalCache,
    Memory,
    RedisCache,
    Refresh,
    TieredCache,
    create_caches,
    share,
)
from cluster_tasks.cache.connection import CacheConnection, Command
from cluster_tasks.cache.counters import Counters
from cluster_tasks.cache.patterns import escape
from cluster_tasks.clock import SystemClock
from cluster_tasks.errors import CacheUnavailable, ConfigurationError
from cluster_tasks.keys import Keys
from cluster_tasks.settings import ClusterSettings, load_settings
from tests.certificates import make_certificate
from tests.redis_cluster import RedisCluster
from tests.waiting import wait_until
from workers.redis_server import RedisServer

KINDS = ["local", "redis", "cluster", "tiered", "tiered cluster"]
ODD_KEYS = ["a*b", "a?b", "[ab]", "a\\b", "{x}", "x}", "a b", "a\nb", "a\0b", "grüße", "-", "a:b", "k" * 1024]
Make = Callable[..., Cache]


@pytest.fixture(scope="module")
def cluster_server(redis_binary: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisCluster]:
    """Three masters with replicas."""
    # None of its masters is to be taken for dead.
    with RedisCluster(tmp_path_factory.mktemp("cluster"), node_timeout_ms=30_000) as cluster:
        yield cluster


@pytest.fixture(params=KINDS)
def make(request: pytest.FixtureRequest) -> Iterator[Make]:
    """Makes a cache as another process would have it: of the same Redis, with a memory of its own."""
    kind, clock = request.param, SystemClock()
    shares = []
    only_memory = Memory(clock, Counters())
    url = ""
    if "cluster" in kind:
        cluster: RedisCluster = request.getfixturevalue("cluster_server")
        cluster.empty()
        url = cluster.url
    elif kind != "local":
        url = request.getfixturevalue("redis_server").url

    def new(namespace: str = "test", **options: Any) -> Cache:
        if kind == "local":
            return LocalCache(only_memory, namespace, **options)
        counters = Counters()
        shares.append(share(CacheConnection(url, clock, timeout_s=5.0), Keys(), clock, counters))
        remote = RedisCache(shares[-1], namespace, **options)
        return TieredCache(Memory(clock, counters), remote) if kind.startswith("tiered") else remote

    yield new
    for shared in shares:
        shared.coherence.close()
        shared.connection.close()


@pytest.fixture
def cache(make: Make) -> Cache:
    return make()


def test_what_is_set_is_there_until_it_is_deleted(cache: Cache) -> None:
    assert cache.get("k") is None
    assert not cache.exists("k")
    assert cache.set("k", b"one")
    assert (cache.get("k"), cache.exists("k")) == (b"one", True)
    assert cache.set("k", b"")
    assert cache.get("k") == b""
    assert cache.delete("k", "never there") == 1
    assert cache.get("k") is None


@pytest.mark.parametrize("key", ODD_KEYS)
def test_any_text_is_a_key_and_a_pattern_of_it_matches_nothing_else(cache: Cache, key: str) -> None:
    values = {other: other.encode() for other in ODD_KEYS}
    assert cache.set_many(values)
    assert cache.get_many(ODD_KEYS) == values
    assert cache.clear(escape(key)) == 1
    assert cache.get_many(ODD_KEYS) == {other: value for other, value in values.items() if other != key}


def test_many_keys_are_set_and_got_together(cache: Cache) -> None:
    values = {f"k{number}": str(number).encode() for number in range(2_500)}
    assert cache.set_many(values)
    assert cache.get_many([*values, "none"]) == values
    assert cache.set_many({})
    assert cache.get_many([]) == {}


def test_a_value_lasts_its_ttl(cache: Cache) -> None:
    began_s = time.monotonic()
    cache.set("short", b"1", ttl_s=0.3)
    cache.set("long", b"1", ttl_s=60)
    assert cache.get("short") == b"1" or time.monotonic() - began_s >= 0.3
    assert cache.expire("long", 0.3)
    assert not cache.expire("none", 1)
    wait_until(lambda: not cache.exists("short") and not cache.exists("long"), 10)


@pytest.mark.parametrize(
    ("pattern", "left"),
    [("*", []), ("a*", ["b1"]), ("a?", ["a10", "b1"]), ("[ab]1", ["a10"]), ("[^a]*", ["a1", "a10"]), ("none*", None)],
)
def test_a_pattern_clears_what_it_matches(cache: Cache, make: Make, pattern: str, left: list[str] | None) -> None:
    keys, other = ["a1", "a10", "b1"], make("other")
    cache.set_many(dict.fromkeys(keys, b"1"))
    other.set_many(dict.fromkeys(keys, b"1"))
    left = keys if left is None else left
    assert cache.clear(pattern) == len(keys) - len(left)
    assert sorted(cache.get_many(keys)) == left
    assert sorted(other.get_many(keys)) == keys, "another namespace is not touched"


def test_what_is_invalidated_is_gone_with_what_is_being_computed(cache: Cache, make: Make) -> None:
    other = make("tenant/test")
    for one in (cache, other):
        one.set("k", b"old")
    before = cache.read(["k"])
    cache.invalidate()
    assert cache.get("k") is None
    cache.write({"k": b"computed from the old"}, generation=before.generation)
    assert cache.get("k") is None
    assert other.get("k") == b"old"
    assert cache.set("k", b"new")
    assert cache.get("k") == b"new"


def test_a_value_that_is_missing_is_computed_once_by_all_who_ask(make: Make) -> None:
    caches, computed, got = [make() for _ in range(2)], [], []

    def compute() -> bytes:
        computed.append(1)
        time.sleep(0.3)
        return b"v"

    # Of the local kind, each namespace has flights of its own, and only the lease is shared.
    threads = [
        threading.Thread(target=lambda cache=cache: got.append(cache.get_or_compute("k", compute)))
        for cache in caches * 8
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [b"v"] * 16
    limit = len(caches) if isinstance(caches[0], LocalCache) else 1
    assert len(computed) <= limit


def test_of_many_keys_each_is_computed_once_by_all_who_ask(make: Make) -> None:
    caches, computed, got = [make() for _ in range(2)], [], []
    keys = [f"k{number}" for number in range(12)]
    caches[0].set(keys[0], b"there")

    def compute(some: list[str]) -> dict[str, bytes]:
        computed.extend(some)
        time.sleep(0.2)
        return {key: key.encode() for key in some} | {"never asked": b""}

    def ask(number: int) -> None:
        # Of sets that overlap, in different orders: nobody waits for one who waits for him.
        some = [keys[(number + step) % 12] for step in range(0, 12 * 5, 5)][: 6 + number]
        got.append((some, caches[number % 2].get_or_compute_many(some, compute)))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for some, values in got:
        assert values == {key: b"there" if key == keys[0] else key.encode() for key in some}
    limit = len(caches) if isinstance(caches[0], LocalCache) else 1
    assert max(computed.count(key) for key in keys[1:]) <= limit
    assert keys[0] not in computed


def test_of_many_keys_what_one_caller_could_not_compute_another_does(cache: Cache) -> None:
    with pytest.raises(LookupError):
        cache.get_or_compute_many(["a", "b"], lambda keys: {}[keys[0]])
    assert cache.get_or_compute_many(["a", "b"], lambda _: {"a": b"1"}) == {"a": b"1"}
    assert cache.get_or_compute_many(["a", "b", "b"], lambda keys: dict.fromkeys(keys, b"2")) == {"a": b"1", "b": b"2"}
    assert cache.get_or_compute_many([], lambda _: {}) == {}


def test_an_error_of_a_computation_reaches_the_caller_and_the_next_one_computes(cache: Cache) -> None:
    def fail() -> bytes:
        raise LookupError("no")

    with pytest.raises(LookupError):
        cache.get_or_compute("k", fail)
    assert cache.get_or_compute("k", lambda: b"v") == b"v"


def test_an_error_reaches_those_who_wait_among_the_same_only(cache: Cache) -> None:
    begun, may_end = threading.Event(), threading.Event()

    def fail() -> bytes:
        begun.set()
        may_end.wait(10)
        raise LookupError("no")

    with ThreadPoolExecutor(3) as executor:
        failing = [executor.submit(cache.get_or_compute, "k", fail, among="a")]
        begun.wait()
        failing += [executor.submit(cache.get_or_compute, "k", lambda: pytest.fail("computed"), among="a")]
        other = executor.submit(cache.get_or_compute, "k", lambda: b"v", among="b")
        time.sleep(0.2)
        assert not other.done(), "what may be stored is waited for"
        may_end.set()
        assert other.result() == b"v"
        assert [type(each.exception()) for each in failing] == [LookupError] * 2
    assert cache.get_or_compute("k", fail, among="a") == b"v"


def test_nothing_is_an_answer_that_is_kept_if_asked(cache: Cache) -> None:
    asked = []

    def compute() -> None:
        asked.append(1)

    for negative_ttl_s in (None, None, 60.0, None):
        assert cache.get_or_compute("k", compute, negative_ttl_s=negative_ttl_s) is None
    assert len(asked) == 3
    assert not cache.exists("k")


@pytest.mark.parametrize("way", ["one", "many", "now", "warm"])
@pytest.mark.parametrize("change", ["set", "delete", "clear", "invalidate"])
def test_what_changed_during_a_computation_is_not_overwritten_by_it(cache: Cache, change: str, way: str) -> None:
    def compute() -> bytes:
        changes: dict[str, Callable[[], object]] = {
            "set": lambda: cache.set("k", b"new"), "delete": lambda: cache.delete("k"), "clear": cache.clear,
            "invalidate": cache.invalidate,
        }  # fmt: skip
        changes[change]()
        return b"of the old"

    def compute_many(keys: list[str]) -> dict[str, bytes]:
        return {key: compute() if key == "k" else b"other" for key in keys}

    if way == "one":
        assert cache.get_or_compute("k", compute) == b"of the old"
    elif way == "now":
        assert cache.get_or_compute("k", compute, refresh=Refresh.NOW) == b"of the old"
    elif way == "many":
        assert cache.get_or_compute_many(["k", "l"], compute_many) == {"k": b"of the old", "l": b"other"}
    else:
        warmed = cache.warm(compute_many, ["k", "l"])
        if change in ("set", "delete"):
            assert (warmed.stored, warmed.left_out) == (1, 1)
    assert cache.get("k") == (b"new" if change == "set" else None)


def change_while_it_is_computed(cache: Cache, change: Callable[[], object], asked: int = 1) -> None:
    """Change what is being computed for a key; who asks after that is given what is computed after that, once."""
    begun, may_end, computed = threading.Event(), threading.Event(), []

    def old() -> bytes:
        begun.set()
        may_end.wait(10)
        return b"old"

    def new() -> bytes:
        computed.append(1)
        time.sleep(0.2)
        return b"new"

    with ThreadPoolExecutor(1 + asked) as executor:
        before = executor.submit(cache.get_or_compute, "k", old)
        begun.wait()
        change()
        after = [executor.submit(cache.get_or_compute, "k", new) for _ in range(asked)]
        assert [each.result() for each in after] == [b"new"] * asked
        assert not before.done()
        may_end.set()
        assert before.result() == b"old"
    assert len(computed) == 1
    assert cache.get("k") == b"new"


@pytest.mark.parametrize("change", ["delete", "clear", "invalidate"])
def test_who_asks_after_a_change_is_not_given_what_was_being_computed_before(cache: Cache, change: str) -> None:
    changes = {"delete": lambda: cache.delete("k"), "clear": cache.clear, "invalidate": cache.invalidate}
    change_while_it_is_computed(cache, changes[change])
    cache.clear()
    change_while_it_is_computed(cache, changes[change], asked=8)


@pytest.mark.parametrize("change", ["delete", "clear", "invalidate"])
def test_nor_is_who_asks_after_a_change_by_another_process(make: Make, change: str) -> None:
    cache = other = make()
    if not isinstance(cache, LocalCache):
        # Who looks every time whether something has changed need not hear of it.
        cache, other = make(staleness_s=0.0), make()
    changes = {"delete": lambda: other.delete("k"), "clear": other.clear, "invalidate": other.invalidate}
    change_while_it_is_computed(cache, changes[change])


def test_what_is_being_computed_is_not_computed_again_for_what_has_changed_beside_it(make: Make) -> None:
    caches = [make() for _ in range(2)]
    begun, may_end = threading.Event(), threading.Event()

    def compute() -> bytes:
        begun.set()
        may_end.wait(10)
        return b"v"

    with ThreadPoolExecutor(8) as executor:
        asked = [executor.submit(caches[0].get_or_compute, "k", compute)]
        begun.wait()
        for cache in caches:
            cache.set("other", b"1")
            cache.clear("none of these*")
        asked += [executor.submit(caches[0].get_or_compute, "k", lambda: pytest.fail("computed")) for _ in range(7)]
        time.sleep(0.2)
        may_end.set()
        assert [each.result() for each in asked] == [b"v"] * 8


def test_a_stale_value_is_served_while_it_is_computed_anew(cache: Cache) -> None:
    cache.get_or_compute("k", lambda: b"old", 0.2, kept_s=60)
    wait_until(lambda: not cache.exists("k"), 10)
    may_end = threading.Event()

    def compute() -> bytes:
        may_end.wait(30)
        return b"new"

    assert cache.get_or_compute("k", compute, 60, kept_s=60) == b"old"
    assert cache.read(["k"]).entries["k"].age_s > 0
    may_end.set()
    wait_until(lambda: cache.get("k") == b"new", 10)
    assert cache.get_or_compute("k", lambda: b"newer", 60, refresh=Refresh.NOW) == b"newer"
    assert cache.get("k") == b"newer"


def test_a_value_has_the_same_age_whoever_asks_and_however_often(cache: Cache) -> None:
    cache.get_or_compute("k", lambda: b"v", ttl_s=86_400)
    for _ in range(3):
        entry = cache.read(["k"]).entries["k"]
        assert (entry.ttl_s, entry.left_s) == (86_400, pytest.approx(86_400, abs=60))


def test_a_value_is_served_stale_to_those_only_who_take_it(cache: Cache) -> None:
    cache.get_or_compute("k", lambda: b"old", ttl_s=0.05, kept_s=60)
    time.sleep(0.1)
    assert cache.get_or_compute("k", lambda: b"new", ttl_s=60) == b"new"


def test_what_is_computed_anew_takes_the_place_of_what_another_computes(make: Make) -> None:
    first = make()
    # Of the local kind, each object has leases of its own.
    second = first if isinstance(first, LocalCache) else make()

    def compute() -> bytes:
        assert second.get_or_compute("k", lambda: b"newer", refresh=Refresh.NOW) == b"newer"
        return b"older"

    assert first.get_or_compute("k", compute) == b"older"
    assert [cache.get("k") for cache in (first, second)] == [b"newer"] * 2


def test_a_value_that_is_set_when_another_process_has_made_all_void_is_there(make: Make) -> None:
    first, second = make(), make()
    assert first.get("k") is second.get("k") is None, "both know the state"
    for number in range(20):
        first.invalidate()
        assert second.set("k", b"%d" % number)
        assert second.get("k") == b"%d" % number


def test_who_waits_for_what_is_not_stored_computes_with_the_others(make: Make) -> None:
    caches, begun, together = [make() for _ in range(3)], threading.Event(), threading.Barrier(2, timeout=20)

    def first() -> None:
        begun.set()
        time.sleep(0.5)

    def later() -> None:
        together.wait()

    with ThreadPoolExecutor(3) as executor:
        asked = [executor.submit(caches[0].get_or_compute, "k", first)]
        begun.wait()
        asked += [executor.submit(cache.get_or_compute, "k", later) for cache in caches[1:]]
        assert [each.result() for each in asked] == [None] * 3


def test_what_was_computed_under_one_shared_lease_is_not_stored_under_another(cache: Cache) -> None:
    def shared() -> dict[str, str]:
        """The lease of one who takes it when another has shared his."""
        cache.hold(cache.lease(["k"], 60), 60, shared=True)
        return cache.lease(["k"], 60)

    entry = {"k": Entry(b"of the old", 60, 60, generation=cache.read(["k"]).generation or "")}
    before = shared()
    cache.delete("k")
    after = shared()
    assert before, "who asks for a shared lease has it"
    assert before != after
    assert cache.commit(before, entry) == 0
    assert cache.get("k") is None
    assert cache.hold(after, 60, shared=True) == 1
    assert cache.lease(["k"], 60) == after, "it is shared as before"
    assert cache.commit(after, entry) == 1


def test_who_computes_a_key_by_asking_for_it_is_told(cache: Cache) -> None:
    with pytest.raises(RuntimeError, match="what computes 'k' in a cache asks the cache for it"):
        cache.get_or_compute("k", lambda: cache.get_or_compute("k", lambda: b"v"))

    def ask_after_a_change() -> bytes | None:
        cache.clear("none of these*")
        return cache.get_or_compute("k", lambda: b"v", among="others")

    with pytest.raises(RuntimeError, match="what computes 'k' in a cache asks the cache for it"):
        cache.get_or_compute("k", ask_after_a_change)
    assert cache.get_or_compute("k", lambda: b"v") == b"v"


def test_who_is_told_to_end_while_he_computes_ends_alone(cache: Cache) -> None:
    begun = threading.Event()

    def end() -> bytes:
        begun.set()
        time.sleep(0.3)
        raise SystemExit

    with ThreadPoolExecutor(2) as executor:
        ended = executor.submit(cache.get_or_compute, "k", end)
        begun.wait()
        waited = executor.submit(cache.get_or_compute, "k", lambda: b"v")
        assert waited.result() == b"v"
        assert isinstance(ended.exception(), SystemExit)


def test_what_is_no_value_is_refused_and_keeps_nobody_waiting(cache: Cache) -> None:
    with pytest.raises(TypeError, match="key='k' of a cache: expected bytes as its value, not str"):
        cache.get_or_compute("k", lambda: "text")  # type: ignore[arg-type, return-value]
    assert cache.lease(["k"], 60), "anybody may compute it"


@pytest.mark.parametrize("option", [{"negative_ttl_s": -1.0}, {"negative_ttl_s": float("nan")}, {"kept_s": -1.0},
                                    {"kept_s": float("inf")}, {"kept_s": 1e30}])  # fmt: skip
def test_times_that_cannot_be_are_refused_before_anything_is_computed(cache: Cache, option: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="of a cache: expected seconds"):
        cache.get_or_compute("k", lambda: pytest.fail("computed"), **option)
    assert cache.get_or_compute("k", lambda: None, negative_ttl_s=0) is None
    assert not cache.read(["k"]).entries, "0: it is not kept"


def test_who_wants_no_stale_value_computes(cache: Cache) -> None:
    cache.get_or_compute("k", lambda: b"old", 0.2, kept_s=60)
    wait_until(lambda: not cache.exists("k"), 10)
    assert cache.get_or_compute("k", lambda: b"new", 60, refresh=Refresh.NEVER) == b"new"


def test_changes_are_seen_by_other_processes_in_time(make: Make) -> None:
    one, other = make(), make()
    for change, expected in [
        (lambda: one.set("k", b"2"), b"2"),
        (lambda: one.delete("k"), None),
        (lambda: one.set("k", b"3"), b"3"),
        (one.invalidate, None),
    ]:
        one.set("k", b"1")
        wait_until(lambda: other.get("k") == b"1", 10)
        change()
        wait_until(lambda expected=expected: other.get("k") == expected, 10)


def test_json_and_vectors_come_back_as_they_went(cache: Cache) -> None:
    cache.set_json("j", {"a": [1, None, "ü"]})
    assert cache.get_json("j") == {"a": [1, None, "ü"]}
    cache.set_vector("v", [0.5, -1.0])
    found = cache.get_vector("v")
    assert found is not None
    assert (found.dtype, found.tolist()) == (np.float32, [0.5, -1.0])
    cache.set("odd", b"123")
    assert (cache.get_vector("odd"), cache.get_json("none"), cache.get_json("v")) == (None, None, None)
    with pytest.raises(ValueError, match="of one dimension"):
        cache.set_vector("v", [[1.0]])
    with pytest.raises(ValueError, match="Out of range float"):
        cache.set_json("j", float("nan"))


@pytest.mark.parametrize("kind", [bytearray, memoryview])
def test_bytes_of_another_kind_are_copied(cache: Cache, kind: Callable[[Any], Any]) -> None:
    buffer = bytearray(b"v")
    assert cache.set("k", kind(buffer))
    buffer[:] = b"w"
    assert cache.get_or_compute("l", lambda: kind(buffer)) == b"w"
    buffer[:] = b"x"
    assert cache.get_many(["k", "l"]) == {"k": b"v", "l": b"w"}
    assert isinstance(cache.get("k"), bytes)


@pytest.mark.parametrize("value", ["text", 5, [1], 0, ""])
def test_what_is_no_bytes_is_refused(cache: Cache, value: Any) -> None:
    cache.set("k", b"v")
    for use in (lambda: cache.set("k", value), lambda: cache.set_many({"k": b"w", "l": value})):
        with pytest.raises(TypeError, match="of a cache: expected bytes"):
            use()
    with pytest.raises(TypeError, match="of a cache: expected bytes"):
        cache.get_or_compute("m", lambda: value)
    assert cache.get_many(["k", "l", "m"]) == {"k": b"v"}


@pytest.mark.parametrize("key", ["", "k" * 1025, "\ud800", 5])
def test_what_cannot_be_a_key_is_refused(cache: Cache, key: Any) -> None:
    for use in (lambda: cache.get(key), lambda: cache.set(key, b""), lambda: cache.delete(key)):
        with pytest.raises(ValueError, match="of a cache: expected text of 1 to 1024 bytes"):
            use()


def test_what_cannot_be_a_ttl_pattern_or_namespace_is_refused(cache: Cache, make: Make) -> None:
    for ttl_s in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"ttl_s=.* of a cache"):
            cache.set("k", b"", ttl_s=ttl_s)
    for pattern in ("[a", "a\\"):
        with pytest.raises(ValueError, match="pattern"):
            cache.clear(pattern)
    for name in ("", "a:b", "a/b/c", "ä"):
        with pytest.raises(ValueError, match="namespace="):
            make(name)


def test_values_that_are_damaged_or_of_another_key_are_misses(redis_server: RedisServer) -> None:
    counters, clock, keys = Counters(), SystemClock(), Keys()
    connection = CacheConnection(redis_server.url, clock, timeout_s=5.0)
    cache = RedisCache(share(connection, keys, clock, counters), "test")
    cache.set_many({"k": b"value", "other": b"another"})
    name = keys.cache_entry("test", "k")
    packed = connection.client.get(name)
    damaged = [packed[:-1], packed[:20], b"", b"x", packed + b"x", packed[:-1] + b"E", b"xx" + packed[2:],
               packed[:2] + b"\x63" + packed[3:], packed[:3] + b"\x01" + packed[4:],
               connection.client.get(keys.cache_entry("test", "other"))]  # fmt: skip
    for value in damaged:
        connection.client.set(name, value, px=60_000)
        counters.take()
        assert cache.get("k") is None
        assert counters.take()["redis.corrupt"] == 1
    # A key without an end that is not ours is no more than that.
    connection.client.set(name, packed)
    assert cache.get("k") is None
    connection.client.delete(keys.cache_state("test"))
    time.sleep(1.1)  # As long as a state is believed.
    assert cache.get("other") is None, "what is stored under a state that Redis has dropped is void"
    connection.close()


class Interrupted(CacheConnection):
    """Does something between an answer of Redis and what is made of it."""

    meanwhile: Callable[[], object] = staticmethod(lambda: None)

    def pipeline(self, commands: Sequence[Command], doing: str, *, may_refuse: bool = False) -> list[Any]:
        replies = super().pipeline(commands, doing, may_refuse=may_refuse)
        self.meanwhile()
        return replies


def test_what_is_read_with_a_state_is_of_its_generation_whatever_is_heard_meanwhile(redis_server: RedisServer) -> None:
    clock = SystemClock()
    connections = [kind(redis_server.url, clock, timeout_s=5.0) for kind in (CacheConnection, Interrupted)]
    first, second = (RedisCache(share(each, Keys(), clock), "test") for each in connections)

    def hear_of_something_missed() -> None:
        second.shared.coherence.hear(f'{token_hex(8)} {token_hex(8)} {token_hex(8)} ["test", null]')

    first.set("k", b"old")
    assert second.get("k") == b"old"
    first.invalidate()
    hear_of_something_missed()
    connections[1].meanwhile = hear_of_something_missed
    assert second.get("k") is None, "it is void, and Redis has said so"
    first.set("k", b"new")
    assert second.get("k") == b"new"
    for connection in connections:
        connection.close()


@pytest.mark.parametrize("staleness_s", [0.0, 1.0])
def test_a_value_that_would_drive_out_all_others_is_not_stored(redis_server: RedisServer, staleness_s: float) -> None:
    settings = ClusterSettings(cache_url=redis_server.url, cache_max_value_mb=1, cache_staleness_s=staleness_s,
                               cache_timeout_s=5)  # fmt: skip
    caches = create_caches(settings, Keys(), SystemClock())
    cache, large = caches.namespace("x"), b"x" * ((1 << 20) + 1)
    assert cache.set("k", large[:-1])
    assert not cache.set_many({"k": large, "l": b"small"})
    assert cache.get_many(["k", "l"]) == {"l": b"small"}, "the older value is gone as well"
    for _ in range(2):
        assert cache.get_or_compute("k", lambda: large) == large
    assert cache.get_or_compute_many(["k", "m"], lambda keys: {key: large if key == "k" else b"1" for key in keys}) == {
        "k": large, "m": b"1"
    }  # fmt: skip
    assert cache.get_many(["k", "m"]) == {"m": b"1"}
    assert cache.get_or_compute("k", lambda: b"not large any more") == cache.get("k")
    assert cache.get_or_compute("k", lambda: large, refresh=Refresh.NOW) == large
    assert cache.get("k") is None, "nor is the older value there any more"
    assert caches.sums()["redis.too_large"] == 5
    caches.close()


def test_a_redis_cluster_wants_a_password_and_speaks_tls(redis_binary: str, tmp_path: Path) -> None:
    clock, password = SystemClock(), "of:the/Cluster%40"
    with RedisCluster(tmp_path / "cluster", password, make_certificate(tmp_path)) as cluster:

        def cache_at(url: str) -> tuple[RedisCache, CacheConnection]:
            connection = CacheConnection(url, clock, timeout_s=5.0)
            return RedisCache(share(connection, Keys(), clock), "test"), connection

        cache, connection = cache_at(cluster.url)
        values = {f"k{number}": b"v" for number in range(100)}
        assert cache.set_many(values)
        assert cache.get_many(values) == values
        assert cache.clear() == 100
        connection.close()
        for wrong in (cluster.url.replace("Cluster", "cluster"), cluster.url.partition("?")[0]):
            other, connection = cache_at(wrong)
            assert not other.set("k", b"v")
            with pytest.raises(CacheUnavailable) as error:
                other.delete("k")
            assert password not in str(error.value)
            connection.close()


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("redis+cluster://", "expected HOST:PORT,HOST:PORT,… and not ''"),
        ("redis+cluster://a:1,b:x", "and not 'b:x' among them"),
        ("redis+cluster://a/0", "and not 'a/0' among them"),
        ("redis+cluster://:hid?den@a", "percent-encoding"),
        ("redis+cluster://a?ssl_ca_certs=/ca", "ssl_ca_certs is for TLS: write rediss+cluster://"),
        ("rediss+cluster://a?ssl_ca_cert=/ca", "unknown option 'ssl_ca_cert'; did you mean 'ssl_ca_certs'?"),
        ("rediss+cluster://a?ssl_cert_reqs=maybe", "ssl_cert_reqs is one of required, optional, none"),
    ],
)
def test_a_url_of_a_cluster_that_cannot_work_is_refused_at_the_start(url: str, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(reason)) as error:
        load_settings({"cluster_cache_url": url}, {})
    assert "hid" not in str(error.value)


def test_a_redis_that_is_away_is_a_miss_for_readers_and_an_error_for_who_must_know(
    redis_binary: str, tmp_path: Path
) -> None:
    clock = SystemClock()
    with RedisServer(tmp_path) as server:
        connection = CacheConnection(server.url, clock, timeout_s=0.3)
        cache = TieredCache(Memory(clock, Counters()), RedisCache(share(connection, Keys(), clock), "test"))
        cache.set("k", b"v")
        assert cache.get("k") == b"v"
        server.stop()
        time.sleep(1.1)  # As long as the process may serve what it holds.
        assert cache.get("k") is None
        assert cache.set("k", b"w") is False
        assert cache.get_or_compute("k", lambda: b"computed") == b"computed"
        for promise in (lambda: cache.delete("k"), cache.clear, cache.invalidate, lambda: cache.expire("k", 1)):
            with pytest.raises(CacheUnavailable):
                promise()
        server.start()
        # Also the subscription may find it away a last time.
        wait_until(lambda: cache.set("k", b"x") and cache.get("k") == b"x", 30)
        cache.redis.shared.coherence.close()
        connection.close()


def test_what_is_missing_is_loaded_in_bulk(cache: Cache) -> None:
    cache.set("k1", b"there")
    asked: list[list[str]] = []

    def load(keys: list[str]) -> dict[str, bytes]:
        asked.append(keys)
        return {key: b"loaded" for key in keys if key != "k3"} | {"never asked": b""}

    warmed = cache.warm(load, ["k0", "k1", "k2", "k3", "k0"], batch=2)
    assert (warmed.present, warmed.stored, warmed.left_out) == (1, 2, 1)
    assert asked == [["k0"], ["k2", "k3"]]
    assert cache.get_many(["k0", "k1", "k2", "k3", "never asked"]) == {"k0": b"loaded", "k1": b"there", "k2": b"loaded"}
