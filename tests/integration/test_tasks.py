"""The ready-made jobs on real workers: what they return, and how they fail."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import ANY

import pytest
from celery import Celery, chain, group
from celery.exceptions import TaskRevokedError

from cluster_tasks.cluster import cluster_of
from cluster_tasks.errors import (
    CircuitOpen,
    CollectionMismatch,
    CollectionNotFound,
    ConfigurationError,
    InvalidArguments,
    ProviderError,
    ProviderUnavailable,
)
from cluster_tasks.shards.database import Database
from cluster_tasks.shards.fusion import VECTOR_SHARE
from cluster_tasks.shards.indexes import WORDS
from cluster_tasks.tasks import embedding, llm, rag, retrieval
from cluster_tasks.tasks.llm import FROM_PASSAGES
from cluster_tasks.testing import CHAT_PATH, EMBEDDINGS_PATH, RERANK_PATH, FakeOpenAI
from tests.integration.ready_made import ROOT, WITHIN_S, Run, end_timeout, log_of, node, sender
from tests.servers import missing, redis_for_results
from tests.waiting import wait_until

DECLARED = (embedding, llm, rag, retrieval)
"""An app knows the jobs of the modules that its process has imported."""
DOCUMENTS = [
    {"id": "sky", "text": "The sky is blue because air scatters blue light.", "metadata": {"topic": "physics"}},
    {"id": "cat", "text": "A cat sleeps for most of the day.", "metadata": {"topic": "animals", "legs": 4}},
    {"id": "hen", "text": "A hen lays about three hundred eggs a year.", "metadata": {"topic": "animals", "legs": 2}},
]


@pytest.fixture(scope="module")
def directory(redis_binary: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def broker(directory: Path) -> Iterator[str]:
    with redis_for_results(directory / "redis") as server:
        yield server.url


@pytest.fixture(scope="module")
def app(broker: str, directory: Path) -> Iterator[Celery]:
    """Sends to a node with the local providers."""
    with node(broker, "local", directory) as app:
        yield app


@pytest.fixture
def run(app: Celery) -> Run:
    return sender(app)


@pytest.fixture
def docs(run: Run, request: pytest.FixtureRequest) -> str:
    """A collection of this test's own."""
    name = request.node.name.removeprefix("test_")[:64]
    added = run("retrieval.add_documents", name, DOCUMENTS)
    assert added == {"collection": name, "ids": ["sky", "cat", "hen"], "count": 3}
    return name


@pytest.fixture(scope="module")
def provider() -> Iterator[FakeOpenAI]:
    with FakeOpenAI() as server:
        yield server


@pytest.fixture(scope="module")
def app_of_remote(broker: str, directory: Path, provider: FakeOpenAI) -> Iterator[Celery]:
    """Sends to a node whose models are behind a URL."""
    settings = {
        "CLUSTER_LLM_BASE_URL": provider.base_url, "CLUSTER_LLM_MODEL": "fake-chat",
        "CLUSTER_EMBEDDING_BASE_URL": provider.base_url, "CLUSTER_EMBEDDING_MODEL": "fake-embedding",
        "CLUSTER_RERANK_BASE_URL": provider.base_url, "CLUSTER_RERANK_MODEL": "fake-rerank",
        "CLUSTER_PROVIDER_MAX_RETRIES": "0",
    }  # fmt: skip
    with node(broker, "remote", directory, **settings) as app:
        yield app


@pytest.fixture
def remote(app_of_remote: Celery) -> Run:
    return sender(app_of_remote)


# Embedding.


def test_one_text_gives_one_vector(run: Run) -> None:
    result = run("embedding.embed", "hello")
    assert len(result["vectors"]) == 1
    assert len(result["vectors"][0]) == result["dimension"] == 384
    assert result["model"] == result["provider"] == "local-hash"


def test_a_node_with_static_embeddings_finds_what_means_the_like(broker: str, directory: Path) -> None:
    if find_spec("wordllama") is None:
        missing("wordllama is not installed: cluster-tasks[static]")
    with node(broker, "static", directory, CLUSTER_EMBEDDING_MODEL="local-static") as app:
        run = sender(app)
        result = run("embedding.embed", "hello")
        assert (result["model"], result["dimension"]) == ("local-static", 256)
        run("retrieval.add_documents", "animals", DOCUMENTS)
        found = run("retrieval.search", "animals", "a kitten naps", k=1)
        assert found["passages"][0]["id"] == "cat"
        with pytest.raises(ConfigurationError, match="'local-hash' needs CLUSTER_EMBEDDING_BASE_URL"):
            run("embedding.embed", "hello", model="local-hash")


def test_many_texts_give_their_vectors_in_order_over_many_requests(remote: Run, provider: FakeOpenAI) -> None:
    provider.requests.clear()
    texts = [f"text number {n}" for n in range(150)]
    result = remote("embedding.embed", texts)
    requests = [request.body["input"] for request in provider.requests if request.path == EMBEDDINGS_PATH]
    assert [len(batch) for batch in requests] == [64, 64, 22]
    assert len(result["vectors"]) == 150
    assert result["vectors"][149] == remote("embedding.embed", texts[149])["vectors"][0]
    assert result["usage"] == {"prompt_tokens": 450, "completion_tokens": 0, "total_tokens": 450}


def test_submitted_texts_get_what_each_would_alone(app: Celery, run: Run) -> None:
    texts = ["hello", ["two texts", "of one job"], "three words here", "!"]
    sent = cluster_of(app).submit(app.tasks["embedding.embed"], texts)
    assert sent.get(timeout=WITHIN_S) == [run("embedding.embed", text) for text in texts]


def test_submitted_texts_are_embedded_in_few_requests(app_of_remote: Celery, provider: FakeOpenAI) -> None:
    provider.requests.clear()
    texts = [f"word {number}" for number in range(100)]
    wait_until(lambda: cluster_of(app_of_remote).view.nodes(), WITHIN_S, "the node is seen")
    results = cluster_of(app_of_remote).submit(app_of_remote.tasks["embedding.embed"], texts).get(timeout=WITHIN_S)
    asked = [request.body["input"] for request in provider.requests if request.path == EMBEDDINGS_PATH]
    # The node has two slots.
    assert sorted(map(len, asked)) == [50, 50]
    assert [result["usage"]["prompt_tokens"] for result in results] == [2] * 100


def test_texts_that_are_refused_together_are_embedded_one_by_one(
    app_of_remote: Celery, provider: FakeOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider.requests.clear()
    monkeypatch.setattr(provider, "most_texts", 1)
    cluster, texts = cluster_of(app_of_remote), [f"word {number}" for number in range(8)]
    results = cluster.submit(app_of_remote.tasks["embedding.embed"], texts).get(timeout=WITHIN_S)
    assert [len(result["vectors"]) for result in results] == [1] * 8
    asked = [request.body["input"] for request in provider.requests if request.path == EMBEDDINGS_PATH]
    assert sorted(map(len, asked)) == [1] * 8 + [4, 4]


def test_a_provider_that_fails_fails_all_texts_that_it_was_given(app_of_remote: Celery, provider: FakeOpenAI) -> None:
    provider.fail(503, times=1)
    cluster, texts = cluster_of(app_of_remote), [f"word {number}" for number in range(8)]
    sent = cluster.submit(app_of_remote.tasks["embedding.embed"], texts)
    ends = sent.get(timeout=WITHIN_S, propagate=False)
    assert [isinstance(end, ProviderUnavailable) for end in ends] in (
        [True] * 4 + [False] * 4,
        [False] * 4 + [True] * 4,
    )


# Retrieval.


def test_search_finds_the_nearest_first_and_only_what_matches(run: Run, docs: str) -> None:
    found = run("retrieval.search", docs, "why is the sky blue?", k=2)
    assert found["collection"] == docs
    nearest, second = found["passages"]
    assert nearest.keys() == {"id", "text", "metadata", "score"}
    assert nearest["id"] == "sky"
    assert nearest["score"] > second["score"]
    few_legs = {"topic": "animals", "legs": {"lt": 4}}
    found = run("retrieval.search", docs, query="why is the sky blue?", where=few_legs)
    assert [passage["id"] for passage in found["passages"]] == ["hen"]


def test_a_vector_searches_like_the_text_it_was_made_of(run: Run, docs: str) -> None:
    [vector] = run("embedding.embed", "a cat")["vectors"]
    assert run("retrieval.search", docs, vector=vector) == run("retrieval.search", docs, "a cat", mode="vector")
    with pytest.raises(CollectionMismatch, match="384 dimensions"):
        run("retrieval.search", docs, vector=[1.0, 2.0])


def test_a_query_is_searched_for_by_words_by_meaning_or_by_both(run: Run, docs: str) -> None:
    question = "Which hens lay eggs?"
    by_words, by_vector, by_both, usual = (
        run("retrieval.search", docs, question, k=3, mode=mode)["passages"]
        for mode in ("text", "vector", "hybrid", None)
    )
    assert [(passage["id"], passage["score"] > 0) for passage in by_words] == [("hen", True)]
    assert len(by_vector) == len(by_both) == 3
    assert -1 <= by_vector[0]["score"] <= 1
    near = {passage["id"]: passage["score"] for passage in by_vector}
    (hen,) = (passage for passage in by_both if passage["id"] == "hen")
    by_meaning = (1 + near["hen"]) / (1 + by_vector[0]["score"])
    assert hen["score"] == pytest.approx(VECTOR_SHARE * by_meaning + 1 - VECTOR_SHARE)
    assert usual == by_both


def test_a_search_for_words_embeds_nothing(remote: Run, provider: FakeOpenAI) -> None:
    remote("retrieval.add_documents", "words", DOCUMENTS)
    embedded = provider.counts[EMBEDDINGS_PATH]
    found = remote("retrieval.search", "words", "eggs", mode="text")
    answered = remote("rag.answer", "How many eggs does a hen lay?", "words", mode="text")
    assert [passage["id"] for passage in found["passages"]] == ["hen"]
    assert [passage["id"] for passage in answered["passages"]] == ["hen"]
    assert provider.counts[EMBEDDINGS_PATH] == embedded
    remote("rag.answer", "How many eggs does a hen lay?", "words", mode="vector")
    assert provider.counts[EMBEDDINGS_PATH] == embedded + 1


def test_documents_are_replaced_by_id_and_added_once_without(run: Run, docs: str) -> None:
    run("retrieval.add_documents", docs, [{"id": "cat", "text": "A cat hunts at night."}])
    first = run("retrieval.add_documents", docs, ["A text alone."])
    again = run("retrieval.add_documents", docs, ["A text alone.", "A text alone."])
    assert again == {**first, "ids": first["ids"] * 2}
    passages = run("retrieval.search", docs, "cat", k=10)["passages"]
    assert passages[0]["text"] == "A cat hunts at night."
    assert len(passages) == 4
    assert run("retrieval.add_documents", docs, []) == {"collection": docs, "ids": [], "count": 0}


def test_documents_are_got_by_id_and_deleted_by_id_and_by_metadata(run: Run, docs: str) -> None:
    sky = next(document for document in DOCUMENTS if document["id"] == "sky")
    got = run("retrieval.get_documents", docs, ["sky", "unknown"])
    assert got == {"collection": docs, "documents": [{"metadata": {}, **sky}]}
    assert run("retrieval.delete_documents", docs, ids=["cat", "unknown"]) == {"deleted": 1}
    assert run("retrieval.delete_documents", docs, where={"topic": "animals"}) == {"deleted": 1}
    assert [passage["id"] for passage in run("retrieval.search", docs, "cat")["passages"]] == ["sky"]


def test_a_split_document_is_replaced_listed_and_deleted_as_one(run: Run, docs: str) -> None:
    text = "".join(f"# Part {n}\n\nA cat sleeps {n} hours. It sleeps {n} hours more.\n\n" for n in range(9))
    how = {"size": 60, "overlap": 0, "format": "markdown"}
    # Of no concern: somebody's own metadata.
    run("retrieval.add_documents", docs, [{"id": "kit", "text": "A", "metadata": {"document": "cat", "passage": 7}}])
    added = run("retrieval.add_documents", docs, [{"id": "cat", "text": text, "metadata": {"of": "cats"}}], split=how)
    assert added == {"collection": docs, "ids": ["cat"], "count": 1, "passages": 9}
    [last, *_] = run("retrieval.search", docs, "Part 8", k=1, where={"heading": "Part 8"})["passages"]
    assert (last["id"], last["text"]) == ("cat#passage-8", "# Part 8\n\nA cat sleeps 8 hours. It sleeps 8 hours more.")
    assert last["metadata"] == {
        "of": "cats", "document": "cat", "passage": 8, "passages": 9, "start": text.index("# Part 8"),
        "heading": "Part 8", "added_by": ANY,
    }  # fmt: skip
    short = run(
        "retrieval.add_documents", docs, [{"id": "cat", "text": text[:90]}, {"id": "none", "text": " "}], split=how
    )
    assert (short["count"], short["passages"]) == (2, 2)
    listed = run("retrieval.list_documents", docs, limit=2)
    assert listed["documents"] == [
        {"id": "cat", "metadata": {}, "passages": 2, "complete": True},
        {"id": "hen", "metadata": DOCUMENTS[2]["metadata"], "passages": 1, "complete": True},
    ]
    following = run("retrieval.list_documents", docs, after=listed["next"])["documents"]
    assert [document["id"] for document in following] == ["kit", "sky"]
    assert run("retrieval.list_documents", docs, where={"topic": "animals"})["next"] is None
    assert run("retrieval.delete_documents", docs, ids=["cat"]) == {"deleted": 2}
    assert {passage["id"] for passage in run("retrieval.search", docs, "cat", k=9)["passages"]} == {"hen", "kit", "sky"}


def test_an_id_of_a_passage_is_no_id_of_a_document(run: Run, docs: str) -> None:
    how = {"size": 16, "overlap": 0}
    run("retrieval.add_documents", docs, [{"id": "a", "text": "One thing. Another thing."}], split=how)
    run("retrieval.add_documents", docs, [{"id": "a#0", "text": "Third thing."}, {"id": "a#1", "text": "Fourth."}])
    for split in (None, how):
        with pytest.raises(InvalidArguments, match=r"documents\.0: 'a#passage-1' is an id as passages"):
            run("retrieval.add_documents", docs, [{"id": "a#passage-1", "text": "Else."}], split=split)
    (passage,) = run("retrieval.get_documents", docs, ["a#passage-1"])["documents"]
    # As it was read it may be put back.
    run("retrieval.add_documents", docs, [passage])
    held = {each["id"]: each for each in run("retrieval.list_documents", docs)["documents"]}
    assert (held["a"]["passages"], held["a"]["complete"]) == (2, True)
    assert {"a#0", "a#1"} < held.keys()


def test_an_unknown_collection_is_named_and_the_nearest_name_with_it(run: Run, docs: str) -> None:
    for job, arguments in (("search", ["cat"]), ("delete_documents", [["cat"]])):
        with pytest.raises(CollectionNotFound, match=f"did you mean '{docs}'"):
            run(f"retrieval.{job}", f"{docs[:-1]}x", *arguments)


def test_collections_are_compacted_by_a_job_that_one_of_the_coordinators_sends(
    app: Celery, run: Run, docs: str, directory: Path
) -> None:
    for number in range(5):
        run("retrieval.add_documents", docs, [f"A text with the number {number}."])
    cluster = cluster_of(app)
    table = Database(str(directory / "local")).open(f"{docs}.g1.0of1")
    assert table is not None
    before = table.version
    cluster.client.delete(cluster.keys.optimized)
    assert [cluster.optimize_collections() for _ in range(3)] == [True, False, False]

    def is_compacted() -> bool:
        table.checkout_latest()  # type: ignore[no-untyped-call]
        return table.version > before and table.index_stats(WORDS).num_unindexed_rows == 0

    wait_until(is_compacted, WITHIN_S)
    assert run("retrieval.optimize", docs) == {"collections": [docs]}
    assert run("retrieval.optimize", "nowhere") == {"collections": []}
    with cluster.locks.acquire(f"optimize/{docs}", 60):
        assert run("retrieval.optimize", docs) == {"collections": []}
    assert len(run("retrieval.search", docs, "text", k=9, mode="text")["passages"]) == 5


# Generation.


def test_without_a_model_only_passages_can_be_answered_from(run: Run) -> None:
    result = run("llm.generate", "How many eggs does a hen lay?", passages=[document["text"] for document in DOCUMENTS])
    assert result["text"] == DOCUMENTS[2]["text"]
    assert (result["provider"], result["finish_reason"], result["tool_calls"]) == ("local-extractive", "stop", [])
    with pytest.raises(ConfigurationError, match="CLUSTER_LLM_BASE_URL"):
        run("llm.generate", "How many eggs does a hen lay?")


def test_a_model_gets_every_parameter_and_its_answer_comes_back(remote: Run, provider: FakeOpenAI) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    tool = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
    provider.reply("Let me see.", tool_calls=[call])
    sent = {
        "messages": [{"role": "user", "content": "What time is it?"}], "model": "other", "temperature": 0.5,
        "max_tokens": 20, "stop": ["\n"], "tools": [tool], "response_format": {"type": "text"}, "top_p": 0.9,
    }  # fmt: skip
    result = remote("llm.generate", **sent, session_id="s")
    assert provider.requests[-1].body == sent
    assert result == {
        "text": "Let me see.", "tool_calls": [call], "model": "other", "finish_reason": "tool_calls",
        "usage": {"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7}, "provider": "openai",
        "degraded": False, "degraded_reason": "", "cached": False, "age_s": 0.0, "quotes": [],
    }  # fmt: skip


def test_a_refused_request_fails_the_job_and_so_does_a_silent_provider(remote: Run, provider: FakeOpenAI) -> None:
    asked = provider.counts[CHAT_PATH]
    provider.fail(400, message="the prompt is too long")
    with pytest.raises(ProviderError, match="the prompt is too long"):
        remote("llm.generate", "hello")
    provider.fail(503)
    with pytest.raises(ProviderUnavailable):
        remote("llm.generate", "hello")
    # The provider's client repeats requests, the job does not.
    assert provider.counts[CHAT_PATH] - asked == 2
    assert remote("llm.generate", "hello")["text"] == "hello"


def test_an_answer_that_nobody_waits_for_any_more_is_not_paid_for(
    remote: Run, app_of_remote: Celery, provider: FakeOpenAI
) -> None:
    remote("retrieval.add_documents", "late", DOCUMENTS)
    found = remote("rag.search", None, "late", 2, None, "sky", "text")
    asked = provider.counts[CHAT_PATH]
    for job, arguments in (("rag.search", [None, "late", 2, None, "sky", "text"]), ("rag.generate", [found, "sky"])):
        with pytest.raises(TaskRevokedError, match="expired"):
            remote(job, *arguments, deadline=time.time() - 1)
    provider.hang()
    late = app_of_remote.tasks["rag.answer"].apply_async(("Why is the sky blue?", "late"), expires=3)
    until_s = time.time() + 3
    wait_until(lambda: time.time() > until_s, WITHIN_S)
    provider.release()
    with pytest.raises(TaskRevokedError, match="expired"):
        late.get(timeout=WITHIN_S)
    assert provider.counts[CHAT_PATH] == asked


def test_nodes_share_what_they_know_of_a_provider_and_its_limits(broker: str, directory: Path) -> None:
    with FakeOpenAI() as model, ExitStack() as stack:
        settings = {
            "CLUSTER_LLM_BASE_URL": model.base_url, "CLUSTER_LLM_MODEL": "fake-chat",
            "CLUSTER_LLM_REQUESTS_PER_MINUTE": "9", "CLUSTER_PROVIDER_WAIT_S": "0",
            "CLUSTER_PROVIDER_MAX_RETRIES": "0", "CLUSTER_STRATEGY_LLM": "round_robin",
            "CLUSTER_BREAKER_FAILURE_THRESHOLD": "2", "CLUSTER_BREAKER_TIMEOUT_S": "300",
        }  # fmt: skip
        app, _ = (stack.enter_context(node(broker, "shared", directory, name, **settings)) for name in "ab")
        run, generate = sender(app), app.tasks["llm.generate"]
        run("retrieval.add_documents", "docs", DOCUMENTS)
        began = time.monotonic()
        model.fail(503, times=None)
        for _ in range(2):
            with pytest.raises(ProviderUnavailable, match="503"):
                run("llm.generate", "hello")
        degraded = run("rag.answer", "Why is the sky blue?", "docs", k=2)
        assert (degraded["text"], degraded["degraded_reason"]) == (DOCUMENTS[0]["text"], "circuit_open")
        refused = [generate.delay("hello") for _ in range(8)]
        refused.append(app.tasks["rag.answer"].delay("Why is the sky blue?", "docs", allow_degraded=False))
        errors = [job.get(timeout=WITHIN_S, propagate=False) for job in refused]
        assert {type(error) for error in errors} == {CircuitOpen}
        assert all(error.retry_after_s > 0 for error in errors)
        assert model.counts[CHAT_PATH] == 2
        model.recover()
        end_timeout(app, f"llm:fake-chat@{model.base_url}")
        kinds = ["breaker open", "breaker closed"]
        wait_until(lambda: answers(run) and breaker_events(app) == kinds, WITHIN_S, "probes find it is back")
        jobs = [generate.delay("hello") for _ in range(12)]
        wait_until(lambda: {job.state for job in jobs} <= {"SUCCESS", "RETRY"}, WITHIN_S)
        if time.monotonic() - began < 55:
            assert model.counts[CHAT_PATH] == 9
            waiting = [job.id for job in jobs if job.state == "RETRY"]
            delayed = [job.payload["headers"]["id"] for job in cluster_of(app).delayed()]
            assert sorted(delayed) == sorted(waiting)
        app.tasks["rag.answer"].delay("Why is the sky blue?", "docs")
        wait_until(
            lambda: "rag.generate" in delayed_tasks(app) or time.monotonic() - began > 55,
            WITHIN_S,
            "the last step of an answer waits for room, too",
        )


def answers(run: Run) -> bool:
    try:
        return bool(run("llm.generate", "hello")["text"])
    except CircuitOpen:
        return False


def delayed_tasks(app: Celery) -> list[str]:
    return [job.payload["headers"]["task"] for job in cluster_of(app).delayed()]


def breaker_events(app: Celery) -> list[str]:
    return [event.kind for event in cluster_of(app).events.latest(100) if event.kind.startswith("breaker")]


# Answers.


def test_an_answer_comes_with_the_passages_it_was_made_from(run: Run, docs: str) -> None:
    result = run("rag.answer", "Why is the sky blue?", docs, k=2)
    assert result["text"] == DOCUMENTS[0]["text"]
    assert result["passages"][0]["id"] == "sky"
    assert len(result["passages"]) == 2
    assert result["model"] == "local-extractive"
    [citation] = result["citations"]
    assert (citation["number"], citation["id"], citation["document"]) == (1, "sky", "sky")
    whole = {"start": 0, "end": len(result["text"]), "passage_start": 0, "passage_end": len(result["text"])}
    assert (citation["spans"], result["unknown_citations"]) == ([whole], [])
    result = run("rag.answer", "Why is the sky blue? Ask the cat", docs, where={"topic": "animals"})
    assert result["text"] == DOCUMENTS[1]["text"]
    assert {passage["id"] for passage in result["passages"]} == {"cat", "hen"}


def test_a_model_gets_the_passages_as_numbered_context(remote: Run, provider: FakeOpenAI) -> None:
    remote("retrieval.add_documents", "docs", DOCUMENTS)
    result = remote("rag.answer", "How many eggs does a hen lay?", "docs", k=2, temperature=0, seed=7)
    body = provider.requests[-1].body
    context, question = body["messages"]
    first, second = (passage["text"] for passage in result["passages"])
    assert first == DOCUMENTS[2]["text"]
    assert context == {"role": "system", "content": f"{FROM_PASSAGES}\n\n[1] {first}\n\n[2] {second}"}
    assert question == {"role": "user", "content": "How many eggs does a hen lay?"}
    assert (body["temperature"], body["seed"]) == (0, 7)
    assert result["provider"] == "openai"


def test_a_model_gets_the_passages_that_another_chose_and_its_markers_are_told_as_citations(
    remote: Run, provider: FakeOpenAI
) -> None:
    manual = {"id": "manual", "text": "# Eggs\n\nA hen lays eggs.\n\n# Sleep\n\nA cat sleeps.\n"}
    how = {"size": 30, "overlap": 0, "format": "markdown"}
    remote("retrieval.add_documents", "manuals", [manual], split=how)
    provider.reply("It sleeps [1]. It does not lay eggs [3].")
    result = remote("rag.answer", "Does a cat sleep?", "manuals", k=1, rerank=True, candidates=2)
    ranking = next(request for request in reversed(provider.requests) if request.path == RERANK_PATH)
    assert (ranking.body["query"], len(ranking.body["documents"])) == ("Does a cat sleep?", 2)
    assert [passage["id"] for passage in result["passages"]] == ["manual#passage-1"]
    assert result["rerank"]["model"] == "fake-rerank"
    assert result["citations"] == [
        {
            "number": 1, "id": "manual#passage-1", "document": "manual", "heading": "Sleep", "page": None,
            "start": manual["text"].index("# Sleep"),
            "spans": [{"start": 0, "end": 14, "passage_start": None, "passage_end": None}],
        }
    ]  # fmt: skip
    assert result["unknown_citations"] == [3]
    # The whole of it ends as the search does.
    provider.fail(503)
    with pytest.raises(ProviderUnavailable, match="503"):
        remote("retrieval.search", "manuals", "a cat", mode="text", rerank=True, allow_degraded=False)


def test_without_a_passage_no_model_is_asked(remote: Run, provider: FakeOpenAI) -> None:
    remote("retrieval.add_documents", "docs", DOCUMENTS)
    asked = provider.counts[CHAT_PATH]
    result = remote("rag.answer", "Why?", "docs", where={"topic": "history"})
    assert (result["text"], result["passages"], result["finish_reason"]) == ("", [], "no_passages")
    assert (result["citations"], result["unknown_citations"]) == ([], [])
    assert result["usage"]["total_tokens"] == 0
    assert provider.counts[CHAT_PATH] == asked


def test_an_answer_fails_with_the_step_that_failed(run: Run, docs: str) -> None:
    with pytest.raises(CollectionNotFound):
        run("rag.answer", "Why?", "nowhere")
    with pytest.raises(ConfigurationError, match="big-model"):
        run("rag.answer", "Why is the sky blue?", docs, model="big-model")


def test_more_answers_than_slots_are_worked_on_at_once_without_waiting_for_each_other(app: Celery, docs: str) -> None:
    # With a worker that waits for its parts, two slots would stand still for ever.
    answers = group(app.tasks["rag.answer"].s("Why is the sky blue?", docs) for _ in range(12))()
    assert {answer["text"] for answer in answers.get(timeout=WITHIN_S)} == {DOCUMENTS[0]["text"]}


# What no caller can check.


def test_a_result_that_does_not_fit_fails_the_next_job_of_a_chain_and_not_the_one_before(app: Celery) -> None:
    embed, generate = app.tasks["embedding.embed"], app.tasks["llm.generate"]
    result = chain(embed.s("hello"), generate.s()).delay()
    with pytest.raises(InvalidArguments, match=r"llm\.generate: prompt: Input should be a valid string"):
        result.get(timeout=WITHIN_S)
    assert result.parent.get(timeout=WITHIN_S)["dimension"] == 384


def test_arguments_sent_around_the_check_fail_the_job(app: Celery) -> None:
    result = app.send_task("retrieval.search", ("docs",), {"query": "a", "k": -1}, queue="local.waiting.retrieval")
    with pytest.raises(InvalidArguments, match=r"retrieval\.search: k: "):
        result.get(timeout=WITHIN_S)


def test_the_log_of_a_worker_shows_neither_questions_nor_answers(app: Celery, run: Run, directory: Path) -> None:
    passages = ["A secretive passage answers a confidential question."]
    job = app.tasks["llm.generate"].delay("What is confidential?", passages=passages)
    assert job.get(timeout=WITHIN_S)["text"] == passages[0]
    log = log_of(directory, "local")
    wait_until(lambda: f"llm.generate[{job.id}] succeeded" in log.read_text(), WITHIN_S)
    assert "confidential" not in log.read_text()


def test_a_plain_import_and_call_reaches_the_ready_made_app(app: Celery, broker: str) -> None:
    script = "from cluster_tasks.tasks import embed; print(embed.delay('hello').get(timeout=60)['dimension'])"
    environment = {**os.environ, "CLUSTER_BROKER_URL": broker, "CLUSTER_NAME": "local"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "384"
