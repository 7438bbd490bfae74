"""What a question is searched for with, and who ranks what is found; in jobs that are run here and now."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from cluster_tasks import Cluster
from cluster_tasks.cluster import cluster_of
from cluster_tasks.errors import CircuitOpen, ConfigurationError, ProviderError, ProviderLimited, ProviderUnavailable
from cluster_tasks.tasks import embedding, rag, retrieval
from cluster_tasks.testing import CHAT_PATH, EMBEDDINGS_PATH, RERANK_PATH, FakeOpenAI

# Celery's own way to store a result that expires.
pytestmark = pytest.mark.filterwarnings("ignore:Call to deprecated setex")
DECLARED = (embedding, rag, retrieval)
QUESTION = "What does an owl eat?"
Run = Callable[..., Any]
FACTS = [{"id": f"fact{number:02}", "text": f"An owl eats {number} mice, what else."} for number in range(30)]
BEST = {
    "id": "best",
    "text": "Voles and shrews and many a beetle are, for all that anybody knows, what an owl does eat on most nights.",
}


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeOpenAI]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with FakeOpenAI() as server:
        yield server


@pytest.fixture
def run(redis_url: str, tmp_path: Path, provider: FakeOpenAI, request: pytest.FixtureRequest) -> Iterator[Run]:
    """Runs a job, with a cache."""
    settings = {
        "data_dir": str(tmp_path / "data"), "cache_url": redis_url.replace("/0", "/1"), "cache_timeout_s": 5,
        "embedding_base_url": provider.base_url, "embedding_model": "fake-embedding",
        "llm_base_url": provider.base_url, "llm_model": "fake-chat",
        "rerank_base_url": provider.base_url, "rerank_model": "fake-rerank",
        "provider_max_retries": 0, "breaker_failure_threshold": 2, **getattr(request, "param", {}),
    }  # fmt: skip
    with Celery("queries", set_as_current=False, broker=redis_url) as app:
        app.conf.update({f"cluster_{name}": value for name, value in settings.items()})
        app.conf.update(task_always_eager=True, task_eager_propagates=True)
        Cluster(app)
        yield lambda job, *args, **kwargs: app.tasks[job](*args, **kwargs)
        cluster_of(app).caches.close()


@pytest.mark.parametrize("job", ["retrieval.search", "rag.search"])
def test_a_kept_vector_of_an_earlier_model_is_made_anew_where_a_collection_holds_others(
    run: Run, provider: FakeOpenAI, job: str
) -> None:
    assert run("embedding.embed", QUESTION)["dimension"] == 384
    # The same name stands for another model from now on.
    provider.dimensions = 16
    run("retrieval.add_documents", "owls", ["An owl eats mice."])
    kept = run("embedding.embed", QUESTION)
    assert (kept["dimension"], kept["cached"]) == (384, True)
    for _ in range(2):
        if job == "rag.search":
            found = run(job, run("embedding.embed", QUESTION), "owls", 5, None, QUESTION, "vector")
        else:
            found = run(job, "owls", QUESTION, mode="vector")
        assert len(found["passages"]) == 1
    kept = run("embedding.embed", QUESTION)
    assert (kept["dimension"], kept["cached"]) == (16, True)
    assert provider.counts[EMBEDDINGS_PATH] == 3


@pytest.fixture
def owls(run: Run, provider: FakeOpenAI) -> str:
    """A collection in which the search puts another document first than the reranker."""
    run("retrieval.add_documents", "owls", [*FACTS, BEST])
    provider.counts.clear()
    return "owls"


def find(run: Run, collection: str, **options: Any) -> Any:
    return run("retrieval.search", collection, QUESTION, mode="vector", **options)


def ids(found: Any) -> list[str]:
    return [passage["id"] for passage in found["passages"]]


def test_a_model_chooses_among_more_passages_than_are_wanted(run: Run, owls: str, provider: FakeOpenAI) -> None:
    plain, found = find(run, owls, k=31), find(run, owls, k=2, rerank=True, candidates=31)
    assert ids(found)[0] == "best" != ids(plain)[0]
    assert found["rerank"] == {"provider": "rerank", "model": "fake-rerank", "degraded": False, "degraded_reason": ""}
    scores = {passage["id"]: passage["score"] for passage in plain["passages"]}
    assert [passage["score"] for passage in found["passages"]] == [scores[each] for each in ids(found)]
    assert [passage["rerank_score"] for passage in found["passages"]] == [1.0, pytest.approx(0.6)]
    body = provider.requests[-1].body
    assert (body["query"], body["top_n"], len(body["documents"])) == (QUESTION, 2, 31)
    assert len(find(run, owls, k=2, rerank="other")["passages"]) == 2
    body = provider.requests[-1].body
    assert (body["model"], len(body["documents"])) == ("other", 25), "so many, if nobody says"
    assert "rerank" not in plain
    nothing = find(run, owls, rerank=True, where={"topic": "none"})
    assert (nothing["passages"], nothing["rerank"]["provider"]) == ([], "")
    assert provider.counts[RERANK_PATH] == 2


def test_without_a_server_what_repeats_itself_is_parted(run: Run, provider: FakeOpenAI) -> None:
    again = [{"id": f"again{number}", "text": "What an owl eats are mice" + "." * number} for number in range(4)]
    other = {"id": "other", "text": "Voles are what an owl eats on a cold night."}
    run("retrieval.add_documents", "repeated", [*again, other, "Trains are late.", "It rains."])
    search = partial(run, "retrieval.search", "repeated", QUESTION, k=2)
    assert ids(search()) == ["again0", "again1"]
    found = search(rerank="local")
    assert ids(found) == ["again0", "other"]
    assert found["rerank"]["model"] == "local-mmr"
    assert provider.counts[RERANK_PATH] == 0


@pytest.mark.parametrize("run", [{"rerank_base_url": None, "rerank_model": None}], indirect=True)
def test_a_model_that_needs_a_server_is_not_silently_replaced(run: Run, owls: str) -> None:
    assert find(run, owls, rerank=True)["rerank"]["model"] == "local-mmr"
    with pytest.raises(ConfigurationError, match="model 'other' needs CLUSTER_RERANK_BASE_URL"):
        find(run, owls, rerank="other")


def test_while_the_reranker_is_away_the_order_of_the_search_remains_and_is_marked(
    run: Run, owls: str, provider: FakeOpenAI
) -> None:
    plain = find(run, owls)
    vector = run("embedding.embed", QUESTION)
    provider.fail(503, times=2)
    for reason in ("unavailable", "unavailable", "circuit_open", "circuit_open"):
        found = find(run, owls, rerank=True)
        assert ids(found) == ids(plain)
        assert {passage["rerank_score"] for passage in found["passages"]} == {None}
        said = found["rerank"]
        assert (said["provider"], said["degraded"], said["degraded_reason"]) == ("search", True, reason)
        assert found["cached"] is False, "it is not kept"
    with pytest.raises(CircuitOpen):
        find(run, owls, rerank=True, allow_degraded=False)
    assert find(run, owls, rerank="local")["rerank"]["degraded"] is False
    assert provider.counts[RERANK_PATH] == 2
    how = {"model": None, "candidates": 25, "allow_degraded": True}
    found = run("rag.search", vector, owls, 5, None, QUESTION, "vector", rerank=how)
    answered = run("rag.generate", found, QUESTION)
    assert (answered["rerank"]["degraded_reason"], answered["degraded"]) == ("circuit_open", False)
    with pytest.raises(CircuitOpen):
        run("rag.search", vector, owls, 5, None, QUESTION, "vector", rerank={**how, "allow_degraded": False})


def test_a_reranker_that_refuses_fails_the_search(run: Run, owls: str, provider: FakeOpenAI) -> None:
    find(run, owls)
    provider.fail(400, message="too many documents")
    with pytest.raises(ProviderError, match="too many documents") as caught:
        find(run, owls, rerank=True)
    assert not isinstance(caught.value, ProviderUnavailable)


@pytest.mark.parametrize("run", [{"rerank_requests_per_minute": 1, "provider_wait_s": 0}], indirect=True)
def test_a_reranker_without_room_is_waited_for_and_never_left_out(run: Run, owls: str, provider: FakeOpenAI) -> None:
    find(run, owls, rerank=True, k=3)
    # A job on a node is sent again for the time when there is room.
    with pytest.raises(ProviderLimited, match="rerank:fake-rerank@"):
        find(run, owls, rerank=True, k=4)
    assert provider.counts[RERANK_PATH] == 1


@pytest.mark.parametrize("run", [{"rerank_fallbacks": [{"model": "small"}]}], indirect=True)
def test_another_reranker_comes_before_the_order_of_the_search(run: Run, owls: str, provider: FakeOpenAI) -> None:
    find(run, owls)
    provider.fail(503)
    found = find(run, owls, rerank="named", candidates=31)
    assert ids(found)[0] == "best"
    said = {"provider": "rerank", "model": "small", "degraded": True, "degraded_reason": "unavailable"}
    assert found["rerank"] == said


def test_a_search_is_kept_as_it_was_ranked(run: Run, owls: str, provider: FakeOpenAI) -> None:
    first = find(run, owls, k=2, rerank=True)
    assert find(run, owls, k=2, rerank=True) == {**first, "cached": True}
    others: list[dict[str, Any]] = [{}, {"rerank": "local"}, {"rerank": True, "candidates": 9}, {"rerank": "other"}]
    assert [find(run, owls, k=2, **other)["cached"] for other in others] == [False] * 4
    assert provider.counts[RERANK_PATH] == 3


def test_an_answer_cites_the_passages_as_they_were_ranked(run: Run, owls: str, provider: FakeOpenAI) -> None:
    vector = run("embedding.embed", QUESTION)
    how = {"model": None, "candidates": 31, "allow_degraded": True}
    found = run("rag.search", vector, owls, 3, None, QUESTION, "vector", rerank=how)
    provider.reply("An owl eats voles [1]. It may eat mice, too [2, 9].")
    answered = run("rag.generate", found, QUESTION)
    assert "[1] " + BEST["text"] in provider.requests[-1].body["messages"][0]["content"]
    assert [(each["number"], each["id"]) for each in answered["citations"]] == [(1, "best"), (2, ids(found)[1])]
    [span] = answered["citations"][0]["spans"]
    assert answered["text"][span["start"] : span["end"]] == "An owl eats voles [1]."
    assert answered["unknown_citations"] == [9]
    assert provider.counts[CHAT_PATH] == 1
