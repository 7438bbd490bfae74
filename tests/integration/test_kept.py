"""What the ready-made jobs keep in the cache, on a real worker: when it is used, and by whom."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery, chain, group, signals
from celery.bin.base import CLIContext
from click.testing import CliRunner, Result

from cluster_tasks import Cluster
from cluster_tasks.cli.cache import JOBS_AT_ONCE
from cluster_tasks.cli.cluster import cluster as cluster_commands
from cluster_tasks.cluster import cluster_of
from cluster_tasks.errors import InvalidArguments, ProviderError, ProviderUnavailable
from cluster_tasks.keys import Keys
from cluster_tasks.tasks import embedding, llm, rag, retrieval
from cluster_tasks.tasks.kept import kept_of
from cluster_tasks.testing import CHAT_PATH, EMBEDDINGS_PATH, FakeOpenAI
from tests.integration.ready_made import WITHIN_S, node
from tests.servers import redis_for_results
from tests.waiting import wait_until
from workers.redis_server import RedisServer

# Celery's own way to store a result that expires.
pytestmark = pytest.mark.filterwarnings("ignore:Call to deprecated setex")
DECLARED = (embedding, llm, rag, retrieval)
LIVES_S = 10.0


@dataclass
class Site:
    """An app that sends to one worker, their provider and their cache."""

    app: Celery
    provider: FakeOpenAI
    cache: RedisServer
    sent: list[str] = field(default_factory=list)
    """The jobs that went by a queue."""

    def call(self, job: str, *args: Any, **kwargs: Any) -> Any:
        """Send a job, or be given its result; what is returned is ready."""
        result = self.app.tasks[job].delay(*args, **kwargs)
        result.get(timeout=WITHIN_S)
        return result

    def get(self, job: str, *args: Any, **kwargs: Any) -> Any:
        """The result of a job."""
        return self.call(job, *args, **kwargs).result

    def known(self, job: str, **kwargs: Any) -> Any:
        """What the caller of a job would be given at once."""
        return type(self.app.tasks[job]).known(self.app, **kwargs)

    def asked(self, path: str) -> int:
        """How often the provider was asked."""
        return self.provider.counts[path]


@pytest.fixture(scope="module")
def _site(redis_binary: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp("kept")
    with (
        redis_for_results(directory / "redis") as broker,
        RedisServer(directory / "cache") as cache,
        FakeOpenAI() as provider,
    ):
        settings = {
            "CLUSTER_LLM_BASE_URL": provider.base_url, "CLUSTER_LLM_MODEL": "fake-chat",
            "CLUSTER_EMBEDDING_BASE_URL": provider.base_url, "CLUSTER_EMBEDDING_MODEL": "fake-embedding",
            "CLUSTER_PROVIDER_MAX_RETRIES": "0", "CLUSTER_CACHE_URL": cache.url, "CLUSTER_CACHE_TTL_S": str(LIVES_S),
            "CLUSTER_CACHE_TIMEOUT_S": "5",
        }  # fmt: skip
        with node(broker.url, "kept", directory, **settings) as app:
            site = Site(app, provider, cache)
            note = lambda sender, **_: site.sent.append(sender)  # noqa: E731
            signals.before_task_publish.connect(note)
            yield site
            signals.before_task_publish.disconnect(note)
            cluster_of(app).caches.close()


@pytest.fixture
def site(_site: Site) -> Site:
    """With an empty cache."""
    _site.cache.start()
    for name in ("embeddings", "answers"):
        wait_until(lambda name=name: cluster_of(_site.app).caches.namespace(name).set("x", b""), WITHIN_S)
        cluster_of(_site.app).caches.namespace(name).invalidate()
    # The worker hears of that at once, and believes what it knew for a second at most.
    _site.provider.counts.clear()
    _site.sent.clear()
    return _site


def test_an_embedding_that_is_known_is_given_in_the_caller_without_a_queue(site: Site) -> None:
    first = site.get("embedding.embed", "a text of this test")
    known = site.call("embedding.embed", "a text of this test")
    assert (known.state, known.ready(), known.successful()) == ("SUCCESS", True, True)
    nothing = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    assert known.result == {**first, "cached": True, "usage": nothing}
    assert (site.asked(EMBEDDINGS_PATH), site.sent) == (1, ["embedding.embed"])
    assert site.app.backend.get_task_meta(known.id)["result"] == known.result, "others find it by its id"
    named = site.app.tasks["embedding.embed"].apply_async(("a text of this test",), task_id="mine")
    assert (named.id, named.ready()) == ("mine", True)
    ignored = site.app.tasks["embedding.embed"].apply_async(("a text of this test",), ignore_result=True)
    assert ignored.get() is None
    assert len(site.sent) == 1


def test_a_batch_embeds_only_what_is_not_known(site: Site) -> None:
    one = site.get("embedding.embed", ["alpha", "beta"])
    both = site.get("embedding.embed", ["gamma", "beta", "delta", "gamma", "alpha"])
    assert site.provider.requests[-1].body["input"] == ["gamma", "delta"]
    assert [both["vectors"][4], both["vectors"][1]] == one["vectors"]
    assert both["vectors"][0] == both["vectors"][3]
    assert (one["cached"], both["cached"]) == (False, False)
    assert site.get("embedding.embed", "gamma")["vectors"] == [both["vectors"][0]]


def test_submitted_texts_are_embedded_if_they_are_not_known_and_each_job_says_whether_its_own_were(site: Site) -> None:
    known = site.get("embedding.embed", ["alpha", "beta"])
    # Two for each of the slots, so that jobs share a message.
    sent = cluster_of(site.app).submit(site.app.tasks["embedding.embed"], ["alpha", "gamma", "beta", ["beta", "delta"]])
    results = sent.get(timeout=WITHIN_S)
    assert sorted(request.body["input"] for request in list(site.provider.requests)[-2:]) == [["delta"], ["gamma"]]
    assert [result["cached"] for result in results] == [True, False, True, False]
    assert [results[0]["vectors"][0], results[2]["vectors"][0]] == known["vectors"]
    assert [result["usage"]["prompt_tokens"] for result in results] == [0, 1, 0, 1]


def test_a_text_that_two_jobs_want_at_once_is_embedded_once(site: Site) -> None:
    site.provider.latency_s = 0.5
    try:
        jobs = [site.app.tasks["embedding.embed"].delay([text, "wanted by both"]) for text in ("mine", "yours")]
        first, second = (job.get(timeout=WITHIN_S) for job in jobs)
    finally:
        site.provider.latency_s = 0.0
    embedded = [text for request in list(site.provider.requests)[-site.asked(EMBEDDINGS_PATH) :]
                for text in request.body["input"]]  # fmt: skip
    assert sorted(embedded) == ["mine", "wanted by both", "yours"]
    assert first["vectors"][1] == second["vectors"][1]


def test_a_vector_that_is_computed_anew_is_forgotten_by_all_processes(site: Site) -> None:
    site.get("embedding.embed", "a text")
    held = cluster_of(site.app).caches.memory.places
    assert site.known("embedding.embed", texts=["a text"])
    assert held("embeddings")
    site.get("embedding.embed", "a text", cache="refresh")
    wait_until(lambda: not held("embeddings"), WITHIN_S, "this process heard of it")


def test_a_caller_may_have_it_computed(site: Site) -> None:
    for use, asked in [(None, 1), (False, 2), ("refresh", 3), (None, 3), (True, 3)]:
        site.get("embedding.embed", "a text", cache=use)
        assert site.asked(EMBEDDINGS_PATH) == asked
    for use in ("sometimes", 1, "true"):
        with pytest.raises(InvalidArguments, match="cache"):
            site.app.tasks["embedding.embed"].delay("a text", cache=use)


def test_what_needs_more_than_a_result_goes_by_a_queue(site: Site) -> None:
    embed, search = site.app.tasks["embedding.embed"], site.app.tasks["llm.generate"]
    site.get("embedding.embed", "known")
    site.sent.clear()
    text, cluster = embed.si("known"), cluster_of(site.app)
    own = cluster.keys.node_queue(cluster.nodes()[0].id)
    calls = [
        lambda: chain(text, text).apply_async(), lambda: group([text, text]).apply_async(),
        lambda: embed.apply_async(("known",), countdown=0.01), lambda: embed.apply_async(("known",), link=text),
        lambda: embed.apply_async(("known",), link_error=search.si("no")),
        lambda: embed.apply_async(("known",), queue=own),
    ]  # fmt: skip
    for call in calls:
        before = len(site.sent)
        call().get(timeout=WITHIN_S)
        assert len(site.sent) > before
    assert site.asked(EMBEDDINGS_PATH) == 1, "but the worker finds it"


def test_answers_are_kept_at_temperature_0_and_for_whom_asks(site: Site) -> None:
    def asked(**options: Any) -> int:
        before = site.asked(CHAT_PATH)
        site.get("llm.generate", "Say hello.", **options)
        return site.asked(CHAT_PATH) - before

    assert [asked(temperature=0.0) for _ in range(2)] == [1, 0]
    assert [asked() for _ in range(2)] == [1, 1]
    assert [asked(cache=True) for _ in range(2)] == [1, 0]
    assert asked(temperature=0.0, cache=False) == 1
    assert asked(temperature=0.0, max_tokens=7) == 1, "another request"
    assert asked(temperature=0.0, cache="refresh") == 1
    kept = site.get("llm.generate", "Say hello.", temperature=0.0, session_id="another")
    assert (kept["text"], kept["cached"], kept["degraded"]) == ("Say hello.", True, False)
    assert 0 <= kept["age_s"] < LIVES_S


def test_a_stale_answer_is_given_when_no_model_is_available(site: Site) -> None:
    ask = {"temperature": 0.0, "passages": ["The sky is blue."]}
    fresh = site.get("llm.generate", "What colour is the sky?", **ask)
    wait_until(lambda: site.known("llm.generate", prompt="What colour is the sky?", **ask) is None, 30)
    site.provider.fail(503, times=None)
    try:
        stale = site.get("llm.generate", "What colour is the sky?", **ask)
        other = site.get("llm.generate", "What is blue?", **ask)
        with pytest.raises(ProviderUnavailable):
            site.get("llm.generate", "What colour is the sky?", allow_degraded=False, **ask)
    finally:
        site.provider.recover()
    assert (stale["text"], stale["degraded"], stale["cached"]) == (fresh["text"], True, True)
    assert stale["degraded_reason"] in ("unavailable", "circuit_open")
    assert stale["age_s"] >= LIVES_S
    assert (other["text"], other["degraded"], other["cached"]) == ("The sky is blue.", True, False)
    assert site.known("llm.generate", prompt="What is blue?", **ask) is None, "that is not kept"


@pytest.mark.parametrize("leader_takes_less", [True, False])
def test_of_equal_requests_at_once_each_gets_what_its_caller_takes(redis_url: str, leader_takes_less: bool) -> None:
    with FakeOpenAI(latency_s=0.7) as provider, Celery("apart", set_as_current=False, broker=redis_url) as app:
        app.conf.update(
            cluster_llm_base_url=provider.base_url, cluster_llm_model="fake-chat", cluster_provider_max_retries=0,
            cluster_breaker_failure_threshold=50, cluster_cache_url=redis_url, cluster_cache_timeout_s=5,
        )  # fmt: skip
        Cluster(app)

        def ask(prompt: str, allow_degraded: bool) -> Any:
            passages = ["The sky is blue."]
            try:
                return app.tasks["llm.generate"](
                    prompt, temperature=0.0, passages=passages, allow_degraded=allow_degraded
                )
            except ProviderUnavailable as exc:
                return exc

        def both(prompt: str) -> dict[bool, Any]:
            before = provider.counts[CHAT_PATH]
            with ThreadPoolExecutor(2) as pool:
                leader = pool.submit(ask, prompt, leader_takes_less)
                wait_until(lambda: provider.counts[CHAT_PATH] > before, WITHIN_S)
                follower = pool.submit(ask, prompt, not leader_takes_less)
                return {leader_takes_less: leader.result(), not leader_takes_less: follower.result()}

        answers = both("What colour is the sky?")
        assert answers[True]["text"] == answers[False]["text"]
        assert provider.counts[CHAT_PATH] == 1, "the follower is given what the leader has stored"
        provider.fail(503, times=None)
        answers = both("What is blue?")
        assert (answers[True]["text"], answers[True]["degraded"]) == ("The sky is blue.", True)
        assert isinstance(answers[False], ProviderUnavailable)
        cluster_of(app).caches.close()


def test_a_search_is_known_until_its_collection_changes(site: Site) -> None:
    site.get("retrieval.add_documents", "birds", [{"id": "hen", "text": "A hen lays eggs."}])
    find = lambda **options: site.get("retrieval.search", "birds", "Who lays eggs?", **options)  # noqa: E731
    ids = lambda found: [passage["id"] for passage in found["passages"]]  # noqa: E731
    first = find()
    assert (ids(first), first["cached"]) == (["hen"], False)
    assert find() == {**first, "cached": True}
    assert find(mode="hybrid") == {**first, "cached": True}
    assert find(k=1)["cached"] is find(mode="text")["cached"] is find(mode="vector")["cached"] is False
    assert find(cache=False)["cached"] is False
    for number in range(5):
        site.get("retrieval.add_documents", "birds", [{"id": f"duck{number}", "text": "A duck lays eggs, too."}])
        assert f"duck{number}" in ids(find(k=9)), "who has added a document finds it"
        assert find(k=9)["cached"] is True
    site.get("retrieval.delete_documents", "birds", ids=["hen"])
    assert "hen" not in ids(find(k=9))
    assert find(k=9)["cached"] is True
    site.provider.fail(400)
    with pytest.raises(ProviderError):
        site.call("retrieval.add_documents", "birds", ["A goose."])
    assert find(k=9)["cached"] is False, "what has failed may have changed something"


def test_searches_that_could_not_be_made_void_are_as_soon_as_the_cache_is_back(site: Site) -> None:
    kept = kept_of(site.app)
    assert kept is not None
    _, before = kept.look_for_search("debts", ["asked"])
    assert before is not None
    kept.keep_search("debts", before, {"collection": "debts", "passages": []})
    assert kept.find_search("debts", ["asked"])
    state = Keys("kept").cache_state("search.debts")
    with redis.Redis.from_url(site.cache.url) as client:
        stored = client.hget(state, "generation")
        assert stored
        # It takes no writes, and keeps what it has.
        client.config_set("min-replicas-to-write", 1)
        try:
            kept.forget_searches("debts")
            assert client.hget(state, "generation") == stored
        finally:
            client.config_set("min-replicas-to-write", 0)
        wait_until(lambda: client.hget(state, "generation") != stored, WITHIN_S, "nobody has to search for it")


def test_a_question_is_answered_from_what_is_kept(site: Site) -> None:
    site.get("retrieval.add_documents", "facts", [{"id": "sky", "text": "The sky is blue."}])
    site.provider.counts.clear()
    first = site.get("rag.answer", "What colour is the sky?", "facts", temperature=0.0)
    again = site.get("rag.answer", "What colour is the sky?", "facts", temperature=0.0)
    assert again["text"] == first["text"]
    assert (site.asked(CHAT_PATH), site.asked(EMBEDDINGS_PATH)) == (1, 1)
    site.get("rag.answer", "What colour is the sky?", "facts", temperature=0.0, cache=False)
    assert (site.asked(CHAT_PATH), site.asked(EMBEDDINGS_PATH)) == (2, 2)


def test_jobs_run_without_a_cache_that_is_away(site: Site) -> None:
    site.get("embedding.embed", "before")
    site.cache.stop()
    for _ in range(2):
        assert site.get("embedding.embed", "before")["cached"] is False
    assert site.get("llm.generate", "Say it.", temperature=0.0)["text"] == "Say it."
    site.get("retrieval.add_documents", "outage", [{"id": "a", "text": "one"}])
    assert site.get("retrieval.search", "outage", "one")["cached"] is False
    site.cache.start()
    wait_until(lambda: site.get("embedding.embed", "before") and site.get("embedding.embed", "before")["cached"], 30)


def test_nothing_is_kept_without_the_url_of_a_cache(redis_url: str, tmp_path: Path) -> None:
    app = Celery("without", set_as_current=False, broker=redis_url)
    Cluster(app)
    assert type(app.tasks["embedding.embed"]).known(app, texts=["a"]) is None
    assert type(app.tasks["llm.generate"]).known(app, prompt="a", temperature=0.0) is None
    app.close()


def warm(site: Site, *texts: str) -> Result:
    """Have texts embedded from the command line."""
    lines = "\n".join(texts)
    return CliRunner().invoke(
        cluster_commands, ["cache", "warm", "-", "--json"], input=lines, obj=CLIContext(site.app, False, None)
    )


def test_texts_of_a_file_are_embedded_before_somebody_asks(site: Site) -> None:
    texts = ["one", "", *(f"text {number}" for number in range(99)), "one"]
    done = warm(site, *texts)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"texts": 100, "known": 0, "embedded": 100}
    assert site.asked(EMBEDDINGS_PATH) == 2


def test_of_the_texts_of_a_file_those_that_are_known_are_told_and_not_embedded(site: Site) -> None:
    some = ["known before", "known as well"]
    # The worker may not have heard yet that what it knew is void.
    wait_until(lambda: site.get("embedding.embed", some) and site.known("embedding.embed", texts=some), WITHIN_S)
    site.sent.clear()
    assert json.loads(warm(site, *some, "not known").stdout) == {"texts": 3, "known": 2, "embedded": 1}
    assert site.provider.requests[-1].body["input"] == ["not known"]
    assert json.loads(warm(site, "not known").stdout) == {"texts": 1, "known": 1, "embedded": 0}
    assert len(site.sent) == 1


def test_a_job_that_does_not_embed_the_texts_of_a_file_is_named(site: Site) -> None:
    site.provider.fail(400, times=None)
    try:
        done = warm(site, "a text that is refused")
    finally:
        site.provider.recover()
    assert done.exit_code == 1
    assert re.search(r"Error: job [0-9a-f-]{36} with 1 texts failed: ProviderError", done.stderr)


def test_of_a_long_file_few_jobs_are_under_way_at_once(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster_tasks.cli.cache.TEXTS_A_JOB", 1)
    site.provider.hang(times=None)
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(warm, site, *(f"long {number}" for number in range(3 * JOBS_AT_ONCE)))
        try:
            wait_until(lambda: len(site.sent) >= JOBS_AT_ONCE, WITHIN_S)
            time.sleep(0.5)  # For those that must not follow.
            under_way = len(site.sent)
        finally:
            site.provider.recover()
        assert done.result().exit_code == 0, done.result().output
    assert (under_way, len(site.sent)) == (JOBS_AT_ONCE, 3 * JOBS_AT_ONCE)
