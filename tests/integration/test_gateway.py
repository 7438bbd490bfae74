"""The gateway to the providers: a real Redis, a loopback server that misbehaves, and several processes."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import redis
from celery import Celery

from cluster_tasks import Cluster
from cluster_tasks.breaker import BreakerPolicy, BreakerState, Outcome, Phase, admit, record
from cluster_tasks.errors import CircuitOpen, ProviderError, ProviderLimited, ProviderUnavailable
from cluster_tasks.gateway.fallbacks import chat_gateway, embedding_gateway
from cluster_tasks.gateway.guard import Guard
from cluster_tasks.gateway.shared import Limits, SharedBreaker
from cluster_tasks.keys import Keys
from cluster_tasks.providers import ChatRequest, EmbeddingRequest, EmbeddingResult, HashEmbeddings
from cluster_tasks.redis_store import connect
from cluster_tasks.tasks import llm
from cluster_tasks.tasks.embedding import BATCH, embed_in_batches
from cluster_tasks.testing import CHAT_PATH, EMBEDDINGS_PATH, FakeOpenAI
from tests.integration.ready_made import end_timeout
from tests.servers import standing_still
from tests.waiting import wait_until
from workers.redis_server import RedisServer

PROVIDER = "llm:model@http://127.0.0.1/v1"
POLICY = BreakerPolicy(failure_threshold=2, timeout_s=0.05, window=4, window_s=100, probe_lease_s=0.05)
PASSAGES = ("Backups run at two in the morning.", "Logs are kept for a week.")
QUESTION = ({"role": "user", "content": "when do backups run?"},)


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with connect(redis_url) as client:
        yield client


@pytest.fixture
def shared(client: redis.Redis) -> Callable[..., SharedBreaker]:
    def shared(
        policy: BreakerPolicy = POLICY, limits: Limits | None = None, longest_wait_s: float = 0
    ) -> SharedBreaker:
        return SharedBreaker(client, Keys(), PROVIDER, policy, limits or Limits(), longest_wait_s)

    return shared


@pytest.fixture
def servers() -> Iterator[tuple[FakeOpenAI, FakeOpenAI]]:
    with FakeOpenAI() as first, FakeOpenAI() as second:
        yield first, second


class Node:
    """What the jobs of one process have: an app in the cluster, and its gateways."""

    def __init__(self, redis_url: str, **settings: Any) -> None:
        self.app = Celery("node", set_as_current=False, broker=redis_url)
        self.app.conf.update({f"cluster_{name}": value for name, value in settings.items()})
        self.cluster = Cluster(self.app)
        self.chat = chat_gateway(self.cluster.settings, self.cluster.neighbourhood)
        self.embeddings = embedding_gateway(self.cluster.settings, self.cluster.neighbourhood)

    def ask(self, allow_degraded: bool = True, **given: Any) -> Any:
        return self.chat.chat(ChatRequest(messages=QUESTION, **given), allow_degraded)

    def fails(self, times: int) -> None:
        for _ in range(times):
            with pytest.raises(ProviderUnavailable):
                self.ask(allow_degraded=False)

    def kinds(self) -> list[str]:
        return [event.kind for event in self.cluster.events.latest()]

    def close(self) -> None:
        self.chat.close()
        self.embeddings.close()
        self.cluster.neighbourhood.client.close()
        self.cluster.client.close()
        self.app.close()


@pytest.fixture
def node(redis_url: str, servers: tuple[FakeOpenAI, FakeOpenAI]) -> Iterator[Callable[..., Node]]:
    made: list[Node] = []

    def node(**settings: Any) -> Node:
        given = {
            "llm_base_url": servers[0].base_url, "llm_model": "fake-chat",
            "embedding_base_url": servers[0].base_url, "embedding_model": "fake-embedding",
            "provider_max_retries": 0, "breaker_failure_threshold": 2, "breaker_timeout_s": 60,
        }  # fmt: skip
        made.append(Node(redis_url, **{**given, **settings}))
        return made[-1]

    yield node
    for each in made:
        each.close()


# The scripts and the pure breaker are one.


def milliseconds(client: redis.Redis) -> int:
    seconds, microseconds = client.time()  # type: ignore[misc]
    return 1000 * int(seconds) + int(microseconds) // 1000


def rounded(state: BreakerState) -> BreakerState:
    """The state in whole milliseconds, which is what a script reads of its clock."""
    return replace(
        state,
        opened_at_s=None if state.opened_at_s is None else round(state.opened_at_s, 3),
        calls=tuple((round(ended_at_s, 3), failed) for ended_at_s, failed in state.calls),
        leases=tuple(round(until_s, 3) for until_s in state.leases),
    )


@pytest.mark.parametrize("seed", range(2))
def test_the_scripts_do_what_the_pure_breaker_does(
    seed: int, client: redis.Redis, shared: Callable[..., SharedBreaker]
) -> None:
    policy, chance = replace(POLICY, minimum_volume=3, window_s=0.2), random.Random(seed)
    breaker, out, seen = shared(policy), [], set()
    for _ in range(200):
        time.sleep(chance.choice((0, 0, 0, 0.01, 0.03)))
        ending = out.pop(chance.randrange(len(out))) if out and chance.random() < 0.6 else None
        outcome = chance.choices(list(Outcome), (5, 4, 1))[0]
        before, begin_ms = breaker.state(), milliseconds(client)
        if ending:
            breaker.record(ending, outcome, None)
        else:
            with suppress(CircuitOpen):
                out.append(breaker.admit(0))
        end_ms, after = milliseconds(client), breaker.state()
        # The script ran in one of these milliseconds.
        times = [at_ms // 1000 + at_ms % 1000 / 1000 for at_ms in range(begin_ms, end_ms + 1)]
        expected = [
            record(before, policy, now_s, ending.permit, outcome) if ending else admit(before, policy, now_s)[0]
            for now_s in times
        ]
        assert rounded(after) in map(rounded, expected)
        seen.add((after.generation > before.generation, after.opened_at_s is not None))
    assert len(seen) == 4, "it did not open and close"


def test_only_one_of_many_learns_that_a_breaker_opened(shared: Callable[..., SharedBreaker]) -> None:
    breaker = shared(replace(POLICY, failure_threshold=4))
    admitted = [breaker.admit(0) for _ in range(12)]
    with ThreadPoolExecutor(12) as pool:
        told = list(pool.map(lambda admission: breaker.record(admission, Outcome.FAILURE, None), admitted))
    assert [news for news in told if news] == [Phase.OPEN]


def test_no_more_probes_get_through_than_successes_are_missing(shared: Callable[..., SharedBreaker]) -> None:
    breaker = shared(replace(POLICY, probe_lease_s=60))
    for _ in range(2):
        breaker.record(breaker.admit(0), Outcome.FAILURE, None)

    def ask(_: int) -> bool:
        try:
            breaker.admit(0)
        except CircuitOpen:
            return False
        return True

    time.sleep(POLICY.timeout_s)
    with ThreadPoolExecutor(12) as pool:
        assert sum(pool.map(ask, range(12))) == 2
    with pytest.raises(CircuitOpen) as caught:
        breaker.admit(0)
    assert 50 < caught.value.retry_after_s <= 60


def test_nodes_with_a_lower_success_threshold_take_up_the_breaker_of_others(
    shared: Callable[..., SharedBreaker], client: redis.Redis
) -> None:
    others = BreakerState(generation=1, opened_at_s=1, successes=POLICY.success_threshold)
    client.set(Keys().breaker(PROVIDER), others.to_json())
    breaker = shared(replace(POLICY, probe_lease_s=60))
    probe = breaker.admit(0)
    with pytest.raises(CircuitOpen):
        breaker.admit(0)
    assert breaker.record(probe, Outcome.SUCCESS, None) is Phase.CLOSED


def test_a_clock_that_was_set_back_shuts_nobody_out(shared: Callable[..., SharedBreaker], client: redis.Redis) -> None:
    breaker = shared(limits=Limits(requests=20))
    far_s = time.time() + 300
    waiting = BreakerState(generation=1, opened_at_s=far_s)
    client.set(Keys().breaker(PROVIDER), waiting.to_json())
    wait_until(lambda: admitted(breaker, most=1), message="the breaker opens for no more than its timeout")
    probing = BreakerState(generation=1, opened_at_s=1, leases=(far_s, far_s))
    client.set(Keys().breaker(PROVIDER), probing.to_json())
    breaker.record(breaker.admit(1), Outcome.SUCCESS, None)
    client.delete(Keys().breaker(PROVIDER))
    age(client, -300)
    assert breaker.admit(1).wait_s == 0


# Breakers.


def test_an_unavailable_provider_is_asked_no_more_by_any_node(
    node: Callable[..., Node], servers: tuple[FakeOpenAI, FakeOpenAI]
) -> None:
    servers[0].fail(503, times=None)
    one, other = node(), node()
    one.fails(2)
    for each in (one, other):
        with pytest.raises(CircuitOpen, match="llm:fake-chat@http://127") as caught:
            each.ask()
        assert 50 < caught.value.retry_after_s <= 60
    assert servers[0].counts[CHAT_PATH] == 2
    [event] = one.cluster.events.latest()
    assert (event.kind, event.facts["provider"]) == ("breaker open", f"llm:fake-chat@{servers[0].base_url}")
    assert "503" in event.facts["reason"]


def test_a_provider_that_came_back_is_asked_again_after_probes(
    node: Callable[..., Node], servers: tuple[FakeOpenAI, FakeOpenAI]
) -> None:
    one, other = node(), node()
    servers[0].fail(503, times=3)
    one.fails(2)
    end_timeout(one.app, f"llm:fake-chat@{servers[0].base_url}")
    other.fails(1)
    with pytest.raises(CircuitOpen):
        one.ask()
    end_timeout(one.app, f"llm:fake-chat@{servers[0].base_url}")
    assert [each.ask().degraded for each in (one, other, one)] == [False] * 3
    assert one.kinds() == ["breaker open", "breaker closed"]


def test_probes_that_hang_make_room_for_others(node: Callable[..., Node]) -> None:
    guard = Guard(node().cluster.neighbourhood, PROVIDER, replace(POLICY, probe_lease_s=0.3), Limits(), 0)
    released, began = threading.Event(), threading.Semaphore(0)

    def fail() -> None:
        raise ProviderUnavailable("down")

    def hang() -> str:
        began.release()
        released.wait()
        return "late"

    def answer() -> str:
        try:
            return guard.send(lambda: "in time", 0, lambda _: 0)
        except CircuitOpen:
            return ""

    for _ in range(2):
        with pytest.raises(ProviderUnavailable, match="down"):
            guard.send(fail, 0, lambda _: 0)
    time.sleep(POLICY.timeout_s)
    with ThreadPoolExecutor(2) as pool:
        hanging = [pool.submit(guard.send, hang, 0, lambda _: 0) for _ in range(2)]
        for _ in hanging:
            began.acquire()
        try:
            for _ in range(2):
                assert wait_until(answer, message="another probe gets through") == "in time"
            # The second success has closed it.
            assert [answer() for _ in range(5)] == ["in time"] * 5
        finally:
            released.set()
        assert [each.result() for each in hanging] == ["late"] * 2


def test_requests_that_are_refused_do_not_open_it(
    node: Callable[..., Node], servers: tuple[FakeOpenAI, FakeOpenAI]
) -> None:
    servers[0].fail(400, times=10)
    one = node()
    for _ in range(10):
        with pytest.raises(ProviderError, match="400"):
            one.ask(passages=PASSAGES)
    assert one.ask().text == QUESTION[0]["content"]


def test_models_of_language_and_embeddings_have_breakers_of_their_own(
    node: Callable[..., Node], servers: tuple[FakeOpenAI, FakeOpenAI]
) -> None:
    one = node()
    servers[0].fail(503, times=2)
    for _ in range(2):
        with pytest.raises(ProviderUnavailable, match="503"):
            one.embeddings.embed(EmbeddingRequest(texts=("a",)))
    with pytest.raises(CircuitOpen):
        one.embeddings.embed(EmbeddingRequest(texts=("a",)))
    assert one.ask().text


def test_one_round_trip_before_a_request_and_one_after_it(node: Callable[..., Node], client: redis.Redis) -> None:
    one = node(llm_requests_per_minute=1000, llm_tokens_per_minute=1_000_000)
    one.ask()

    def commands() -> int:
        return int(client.info("commandstats")["cmdstat_evalsha"]["calls"])  # type: ignore[index]

    before, total = commands(), client.info("stats")["total_commands_processed"]  # type: ignore[index]
    one.ask()
    assert commands() - before == 2
    # Those that a script calls count, too; INFO itself did thrice.
    assert client.info("stats")["total_commands_processed"] - total <= 2 + 3 + 9  # type: ignore[index]


# Without Redis.


def test_without_redis_a_process_keeps_a_breaker_of_its_own_and_no_job_hangs(
    node: Callable[..., Node], servers: tuple[FakeOpenAI, FakeOpenAI], redis_server: RedisServer
) -> None:
    one = node()
    assert one.ask().text
    redis_server.stop()
    assert one.ask().text
    servers[0].fail(503, times=None)
    one.fails(2)
    with pytest.raises(CircuitOpen):
        one.ask()
    assert servers[0].counts[CHAT_PATH] == 4


def test_a_redis_that_stands_still_costs_a_job_a_second_once(
    node: Callable[..., Node], redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    one = node()
    one.ask()
    with standing_still(redis_server.pid):
        for _ in range(5):
            assert one.ask().text
    assert sum("is not shared" in record.message for record in caplog.records) == 1


# Fallbacks.


def test_the_next_provider_answers_and_says_why(
    node: Callable[..., Node], servers: tuple[FakeOpenAI, FakeOpenAI]
) -> None:
    first, second = servers
    first.fail(503, times=2)
    one = node(llm_fallbacks=[{"base_url": second.base_url, "model": "backup"}])
    results = [one.ask(model="the-first-ones", temperature=0.5) for _ in range(3)]
    assert [result.model for result in results] == ["backup"] * 3
    assert [result.degraded_reason for result in results] == ["unavailable", "unavailable", "circuit_open"]
    assert all(result.degraded for result in results)
    assert second.requests[-1].body["temperature"] == 0.5
    assert (first.counts[CHAT_PATH], second.counts[CHAT_PATH]) == (2, 3)


def test_fallbacks_are_asked_in_their_order_each_with_its_own_key_only(
    node: Callable[..., Node], servers: tuple[FakeOpenAI, FakeOpenAI]
) -> None:
    first, second = servers
    first.fail(503, times=2)
    second.fail(404)
    one = node(
        llm_api_key="first",
        llm_fallbacks=[
            {"model": "small"}, {"base_url": second.base_url, "model": "a", "api_key": "second"},
            {"base_url": second.base_url, "model": "b"},
        ],
    )  # fmt: skip
    assert one.ask().model == "b"
    asked = [(request.body["model"], request.headers.get("authorization")) for request in first.requests]
    assert asked == [("fake-chat", "Bearer first"), ("small", "Bearer first")]
    asked = [(request.body["model"], request.headers.get("authorization")) for request in second.requests]
    assert asked == [("a", "Bearer second"), ("b", None)]


def test_passages_are_the_last_resort(node: Callable[..., Node], servers: tuple[FakeOpenAI, FakeOpenAI]) -> None:
    first, second = servers
    first.fail(503, times=None)
    second.fail(503, times=None)
    one = node(llm_fallbacks=[{"base_url": second.base_url, "model": "backup"}])
    result = one.ask(passages=PASSAGES, model="the-first-ones")
    assert (result.text, result.provider) == (PASSAGES[0], "local-extractive")
    assert (result.degraded, result.degraded_reason) == (True, "unavailable")
    with pytest.raises(ProviderUnavailable, match=first.base_url):
        one.ask()
    with pytest.raises(ProviderUnavailable, match=r"503|not asked"):
        one.ask(passages=PASSAGES, response_format={"type": "json_object"})


def test_who_wants_no_lesser_answer_gets_an_open_circuit(
    node: Callable[..., Node], servers: tuple[FakeOpenAI, FakeOpenAI]
) -> None:
    first, second = servers
    first.fail(503, times=None)
    one = node(llm_fallbacks=[{"base_url": second.base_url, "model": "backup"}])
    one.fails(2)
    with pytest.raises(CircuitOpen):
        one.ask(allow_degraded=False, passages=PASSAGES)
    assert second.counts[CHAT_PATH] == 0


def test_embeddings_fall_back_to_the_same_model_only(
    node: Callable[..., Node], servers: tuple[FakeOpenAI, FakeOpenAI]
) -> None:
    first, second = servers
    first.fail(503, times=None)
    one = node(embedding_fallbacks=[{"base_url": second.base_url}])
    for _ in range(4):
        assert one.embeddings.embed(EmbeddingRequest(texts=("a",))).model == "fake-embedding"
    assert (first.counts[EMBEDDINGS_PATH], second.counts[EMBEDDINGS_PATH]) == (2, 4)


def test_a_place_of_embeddings_that_refuses_hides_none_behind_it(
    node: Callable[..., Node], servers: tuple[FakeOpenAI, FakeOpenAI]
) -> None:
    first, third = servers
    first.fail(503, times=None)
    request = EmbeddingRequest(texts=("a",))
    with FakeOpenAI(api_key="another") as second:
        one = node(embedding_fallbacks=[{"base_url": each.base_url} for each in (second, third)])
        assert one.embeddings.embed(request).model == "fake-embedding"
        assert [each.counts[EMBEDDINGS_PATH] for each in (first, second, third)] == [1, 1, 1]
        third.fail(404, times=None)
        with pytest.raises(ProviderUnavailable, match=first.base_url):
            one.embeddings.embed(request)


def test_embeddings_that_the_first_place_refuses_are_asked_of_no_other(
    node: Callable[..., Node], servers: tuple[FakeOpenAI, FakeOpenAI]
) -> None:
    first, second = servers
    first.fail(401)
    one = node(embedding_fallbacks=[{"base_url": second.base_url}])
    with pytest.raises(ProviderError, match="401"):
        one.embeddings.embed(EmbeddingRequest(texts=("a",)))
    assert second.counts[EMBEDDINGS_PATH] == 0


def test_the_configuration_that_celery_shows_holds_no_key_of_a_fallback(node: Callable[..., Node]) -> None:
    one = node(llm_fallbacks=[{"model": "small", "api_key": "sk-very-secret"}])
    assert "sk-very-secret" not in repr(one.app.conf.table(with_defaults=True)) + one.app.bugreport()
    assert one.cluster.settings.llm_fallbacks[0].api_key


# Limits.


def admitted(breaker: SharedBreaker, tokens: int = 1, most: int = 100) -> int:
    for count in range(most):
        try:
            breaker.admit(tokens)
        except (CircuitOpen, ProviderLimited):
            return count
    return most


def test_in_a_minute_no_more_requests_go_out_than_allowed(
    shared: Callable[..., SharedBreaker], client: redis.Redis
) -> None:
    breaker = shared(limits=Limits(requests=7))
    assert admitted(breaker) == 7
    with pytest.raises(ProviderLimited) as caught:
        breaker.admit(1)
    assert 55 < caught.value.retry_after_s <= 61
    age(client, 30)
    assert admitted(breaker) == 0
    age(client, 31)
    assert admitted(breaker) == 7


def test_tokens_are_reserved_by_estimate_and_settled_by_what_was_taken(shared: Callable[..., SharedBreaker]) -> None:
    breaker = shared(limits=Limits(tokens=100))
    first = breaker.admit(60)
    with pytest.raises(ProviderLimited):
        breaker.admit(60)
    breaker.record(first, Outcome.SUCCESS, 10)
    second = breaker.admit(60)
    breaker.record(second, Outcome.SUCCESS, 90)
    assert admitted(breaker) == 0


def test_a_request_larger_than_its_limit_goes_out_alone(
    shared: Callable[..., SharedBreaker], client: redis.Redis
) -> None:
    breaker = shared(limits=Limits(tokens=100))
    breaker.admit(500)
    assert admitted(breaker) == 0
    age(client, 61)
    assert admitted(breaker, tokens=500) == 1


def test_requests_take_turns_in_the_order_in_which_they_asked(
    shared: Callable[..., SharedBreaker], client: redis.Redis
) -> None:
    breaker = shared(limits=Limits(requests=2), longest_wait_s=130)
    waits = [breaker.admit(1).wait_s for _ in range(6)]
    assert [round(wait_s / 61) for wait_s in waits] == [0, 0, 1, 1, 2, 2]
    with pytest.raises(ProviderLimited):
        breaker.admit(1)


@pytest.mark.parametrize("seed", range(3))
def test_no_minute_holds_more_than_the_limits_and_nobody_is_overtaken(
    seed: int, shared: Callable[..., SharedBreaker], client: redis.Redis
) -> None:
    chance, breaker = random.Random(seed), shared(limits=Limits(requests=4, tokens=100), longest_wait_s=10_000)
    sent = []
    for _ in range(60):
        admission, tokens = breaker.admit(chance.choice((2, 20, 45, 70, 100))), 0
        if chance.random() < 0.3:
            tokens = admission.tokens // 2
            breaker.record(admission, Outcome.SUCCESS, tokens)
        sent.append((int(admission.second), tokens or admission.tokens))
    assert sent == sorted(sent, key=lambda each: each[0])
    for begin, _ in sent:
        minute = [tokens for second, tokens in sent if begin <= second <= begin + 60]
        assert len(minute) <= 4
        assert sum(minute) <= 100


def test_an_open_breaker_spends_no_share_of_the_limits(
    shared: Callable[..., SharedBreaker], client: redis.Redis
) -> None:
    breaker = shared(replace(POLICY, timeout_s=60), Limits(requests=4))
    for _ in range(2):
        breaker.record(breaker.admit(1), Outcome.FAILURE, None)
    for _ in range(5):
        with pytest.raises(CircuitOpen):
            breaker.admit(1)
    client.delete(Keys().breaker(PROVIDER))
    assert admitted(breaker) == 2


def test_over_its_limits_the_next_provider_answers_but_no_stand_in(
    node: Callable[..., Node], servers: tuple[FakeOpenAI, FakeOpenAI]
) -> None:
    first, second = servers
    fallbacks = [{"base_url": second.base_url, "model": "backup", "requests_per_minute": 1}]
    one = node(llm_requests_per_minute=1, llm_fallbacks=fallbacks, provider_wait_s=0)
    results = [one.ask(), one.ask()]
    assert [(result.degraded, result.degraded_reason) for result in results] == [(False, ""), (True, "rate_limited")]
    for allow_degraded in (True, False):
        with pytest.raises(ProviderLimited, match="llm:fake-chat") as caught:
            one.ask(allow_degraded, passages=PASSAGES)
        assert 50 < caught.value.retry_after_s <= 61
    assert (first.counts[CHAT_PATH], second.counts[CHAT_PATH]) == (1, 1)
    assert one.kinds() == []


def test_a_request_whose_turn_comes_soon_waits_for_it(
    node: Callable[..., Node], servers: tuple[FakeOpenAI, FakeOpenAI], client: redis.Redis
) -> None:
    one = node(llm_requests_per_minute=1)
    began = time.monotonic()
    one.ask()
    age(client, 58, f"llm:fake-chat@{servers[0].base_url}")
    assert one.ask().degraded is False
    # Three seconds after the beginning of the second in which the first one was sent.
    assert time.monotonic() - began >= 2


def test_an_eager_job_fails_for_a_limit_for_it_has_no_later(node: Callable[..., Node]) -> None:
    generate = node(llm_requests_per_minute=1, provider_wait_s=0).app.tasks[llm.generate.name]
    assert generate.apply(("hello",)).get()["text"] == "hello"
    with pytest.raises(ProviderLimited):
        generate.apply(("hello",)).get()


def test_a_job_of_several_requests_waits_where_it_is_once_it_has_begun() -> None:
    class Limited(HashEmbeddings):
        asked = 0

        def embed(self, request: EmbeddingRequest) -> EmbeddingResult:
            self.asked += 1
            if self.asked in limited:
                raise ProviderLimited("no room", 0.01)
            return super().embed(request)

    texts, limited = [f"text {i}" for i in range(2 * BATCH + 1)], {2, 3, 5}
    assert len(embed_in_batches(Limited(), texts).vectors) == len(texts)
    limited = {1}
    with pytest.raises(ProviderLimited):
        embed_in_batches(Limited(), texts)


def test_texts_of_one_job_are_embedded_by_one_model_though_another_takes_over_midway() -> None:
    class Changing(HashEmbeddings):
        def __init__(self, of: Callable[[int], tuple[str, int]]) -> None:
            super().__init__()
            self.of, self.asked = of, 0

        def embed(self, request: EmbeddingRequest) -> EmbeddingResult:
            self.asked += 1
            (model, dimensions), result = self.of(self.asked), super().embed(request)
            return result.model_copy(update={"model": model, "vectors": result.vectors[:, :dimensions]})

    texts = [f"text {i}" for i in range(3 * BATCH)]
    embedded = embed_in_batches(Changing(lambda asked: ("first", 384) if asked < 3 else ("second", 128)), texts)
    assert (embedded.model, embedded.vectors.shape) == ("second", (len(texts), 128))
    for changes in (lambda asked: (str(asked), 384), lambda asked: ("one", 100 + asked)):
        with pytest.raises(ProviderUnavailable, match="cannot be mixed"):
            embed_in_batches(Changing(changes), texts)


def age(client: redis.Redis, seconds: int, provider: str = PROVIDER) -> None:
    """Let what was spent lie so long ago."""
    key = Keys().limits(provider)
    spent = json.loads(client.get(key) or "[]")  # type: ignore[arg-type]
    client.set(key, json.dumps([[second - seconds, *rest] for second, *rest in spent]))
