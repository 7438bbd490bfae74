"""Collections in Qdrant, beyond what the contract of all stores says: outages, keys, processes, and the jobs."""

from __future__ import annotations

import gc
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
from celery import Celery
from celery.bin.base import CLIContext
from click.testing import CliRunner
from qdrant_client import QdrantClient, models

from cluster_tasks import Cluster
from cluster_tasks.cli.cluster import cluster as group
from cluster_tasks.cluster import cluster_of
from cluster_tasks.errors import CollectionNotFound, ConfigurationError, InvalidArguments, StoreUnavailable
from cluster_tasks.shards.assignments import Assigned, Division
from cluster_tasks.shards.documents import Document
from cluster_tasks.shards.qdrant import open_store
from cluster_tasks.shards.qdrant.store import WRITTEN_AT_ONCE, QdrantStore
from cluster_tasks.shards.qdrant.words import document_vector, query_vector
from cluster_tasks.tasks import embedding, llm, rag, retrieval
from cluster_tasks.tasks.fanout import best_node, shares_of
from cluster_tasks.tasks.ready_made import backends_of
from tests.integration.ready_made import Run, node, sender
from tests.qdrant_server import QdrantServer

DECLARED = (embedding, llm, rag, retrieval)
MODEL = "model-a"


def add(store: QdrantStore, *documents: Document, collection: str = "docs") -> int:
    return store.upsert(collection, documents, np.ones((len(documents), 3)), MODEL)


@pytest.fixture
def server() -> Iterator[QdrantServer]:
    with QdrantServer(key="pass-word") as server:
        yield server


@pytest.fixture
def store(server: QdrantServer) -> Iterator[QdrantStore]:
    with closing(open_store(server.url)) as store:
        yield store


# Words.


def test_words_weigh_less_the_longer_a_text_is_and_the_more_often_they_are_said() -> None:
    (dimension,) = query_vector("hens")
    once, twice, long = ("hen", "hen hen", "hen " + "egg " * 300)
    weights = [document_vector(text)[dimension] for text in (once, twice, long)]
    assert weights[2] < weights[0] < weights[1] < 2 * weights[0]
    assert query_vector("hen Hens, HEN") == {dimension: 1.0}
    assert document_vector("the of and …") == {}


# What Qdrant cannot do.


def test_texts_have_no_order_and_that_is_said(store: QdrantStore) -> None:
    add(store, Document(text="t", metadata={"year": "2020"}))
    for where in ({"year": {"gte": "2"}}, {"n": 1, "year": {"lt": "x"}}):
        with pytest.raises(InvalidArguments, match=r"'year'.*orders numbers only"):
            store.search("docs", np.ones(3), 1, where)
        with pytest.raises(InvalidArguments, match="'year'"):
            store.delete("docs", where=where)
    assert store.count("docs") == 1


# Servers.


def test_an_outage_is_one_until_the_server_is_back(server: QdrantServer, store: QdrantStore) -> None:
    add(store, Document(id="a", text="t"))
    server.stop()
    for operation in (store.collections, lambda: store.count("docs"), lambda: add(store, Document(text="u"))):
        with pytest.raises(StoreUnavailable, match=r"127\.0\.0\.1"):
            operation()
    server.start()
    for server.failing in (500, 503, 429, 400):
        with pytest.raises(StoreUnavailable, match=f"{server.failing}"):
            store.search("docs", np.ones(3), 1)
    server.failing = 0
    assert [passage.id for passage in store.search("docs", np.ones(3), 5)] == ["a"]


def test_a_wrong_key_is_refused_and_not_shown(server: QdrantServer, store: QdrantStore) -> None:
    add(store, Document(text="t"))
    for url in (server.url.replace("pass-word", "wrong-word"), server.url.replace(":pass-word@", "")):
        with closing(open_store(url)) as other, pytest.raises(ConfigurationError, match="VECTOR_URL") as refused:
            other.count("docs")
        assert "word" not in str(refused.value)


def test_many_documents_are_written_in_several_requests_and_a_second_upsert_repeats_none(
    server: QdrantServer, store: QdrantStore
) -> None:
    documents = [Document(id=f"d{n}", text=f"text {n}") for n in range(2 * WRITTEN_AT_ONCE + 1)]
    for _ in range(2):
        server.requests.clear()
        assert add(store, *documents) == len(documents)
        writes = [request for request in server.requests if request.startswith("PUT") and request.endswith("/points")]
        assert len(writes) == 3
        assert store.count("docs") == len(documents)


def test_the_index_of_passages_is_made_though_the_maker_of_the_collection_died_before_it(server: QdrantServer) -> None:
    server.failing, server.failing_at = 500, "PUT index"
    with closing(open_store(server.url)) as store, pytest.raises(StoreUnavailable):
        add(store, Document(id="a", text="one"))
    server.failing = 0
    with closing(open_store(server.url)) as store:
        for _ in range(2):
            add(store, Document(id="a", text="one"))
    assert sum(request.startswith("PUT") and request.endswith("/index") for request in server.requests) == 2


def test_collections_of_others_are_left_alone(server: QdrantServer, store: QdrantStore) -> None:
    with closing(QdrantClient(port=server.port, headers={"api-key": "pass-word"}, check_compatibility=False)) as client:
        params = models.VectorParams(size=3, distance=models.Distance.DOT)
        for name in ("docs", "cluster-tasks.foreign", "cluster-tasks.not.ours"):
            client.create_collection(name, vectors_config={"vector": params})
    with pytest.raises(CollectionNotFound):
        store.count("docs")
    add(store, Document(text="t"))
    assert store.collections() == ["docs", "foreign"]
    with closing(open_store(f"{server.url}/other")) as other:
        assert other.collections() == []
        add(other, Document(text="u"), Document(text="v"))
        assert (store.count("docs"), other.count("docs")) == (1, 2)
    with pytest.raises(ConfigurationError, match="does not name its embedding model"):
        add(store, Document(text="t"), collection="foreign")


def test_a_child_of_a_process_opens_connections_of_its_own(server: QdrantServer, store: QdrantStore) -> None:
    add(store, Document(text="t"))
    child = os.fork()
    if not child:
        try:
            os._exit(0 if store.count("docs") == 1 else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert store.count("docs") == 1


# Without a server.


@contextmanager
def client_leaves_files_open() -> Iterator[None]:
    """Where it cannot open a folder, Qdrant's client leaves what it has opened there to the garbage collector."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        gc.collect()


def test_documents_outlive_the_process_and_one_at_a_time_has_the_folder(tmp_path: Path) -> None:
    url = f"qdrant://{tmp_path / 'data'}"
    with closing(open_store(url)) as store:
        add(store, Document(id="a", text="hens lay eggs", metadata={"n": 1.5}))
        said = pytest.raises(ConfigurationError, match=f"{tmp_path / 'data'}: .*one process")
        with client_leaves_files_open(), closing(open_store(url)) as other, said:
            other.count("docs")
    with closing(open_store(url)) as store:
        assert store.search("docs", np.ones(3), 5, {"n": 1.5}, text="egg")[0].id == "a"


def test_a_child_of_a_process_that_used_the_folder_is_refused(tmp_path: Path) -> None:
    with closing(open_store(f"qdrant://{tmp_path / 'data'}")) as store:
        add(store, Document(text="t"))
        child = os.fork()
        if not child:
            try:
                store.count("docs")
            except StoreUnavailable:
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0


def test_a_damaged_folder_is_unavailable_and_not_empty(tmp_path: Path) -> None:
    with closing(open_store(f"qdrant://{tmp_path / 'data'}")) as store:
        add(store, Document(text="t"))
    (tmp_path / "data" / "meta.json").write_text("{")
    said = pytest.raises(StoreUnavailable, match=f"{tmp_path / 'data'}")
    with client_leaves_files_open(), closing(open_store(f"qdrant://{tmp_path / 'data'}")) as store, said:
        store.count("docs")


def test_without_the_client_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "qdrant_client", None)
    with pytest.raises(ConfigurationError, match=r"cluster-tasks\[qdrant\]"):
        open_store("qdrant://host")


# The jobs.


@pytest.fixture
def app(redis_url: str, server: QdrantServer) -> Iterator[Celery]:
    with Celery("commands", set_as_current=False, broker=redis_url) as app:
        app.conf.update(cluster_vector_url=server.url)
        Cluster(app)
        yield app
        backends_of(app).store.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("words", [[], ["move", "docs/0", "a"], ["split", "docs", "4"]])
def test_shards_are_qdrants_own_matter_and_the_commands_say_so(app: Celery, words: list[str]) -> None:
    done = CliRunner().invoke(group, ["shards", *words], obj=CLIContext(app, no_color=False, workdir=None))
    assert (done.exit_code, done.stdout) == (1, "")
    assert "outside engine, qdrant://:**@127.0.0.1" in done.stderr
    assert "pass-word" not in done.stderr


def test_nothing_is_planned_sent_to_shards_or_compacted(app: Celery) -> None:
    cluster = cluster_of(app)
    # Left from before the collections were in Qdrant.
    cluster.assignments.announce("docs", Division(1, 2))
    assigned = {"docs": Assigned(1, (("a@x",), ("b@x",)))}
    assert cluster.assignments.write("", assigned, cluster.events.entry("shards assigned"))
    assert cluster.shard_map.shares("docs") is not None
    assert shares_of(app, "docs", 5) is None
    assert best_node(app, "docs") is None
    assert not cluster.optimize_collections()
    cluster.plan_shards_in_turn()
    assert cluster.assignments.claim("plan", 1.0)
    asked = retrieval.asking("docs", 5, None, "text", "sky", None, None)
    part = app.tasks["retrieval.search_shards"](asked, 1, [0, 1])
    assert part["error"][0] == "LayoutChanged"


@pytest.fixture(params=["folder", "server"])
def run(request: pytest.FixtureRequest, redis_url: str, tmp_path: Path, server: QdrantServer) -> Iterator[Run]:
    """Sends jobs to a node whose collections are in Qdrant."""
    url = f"qdrant://{tmp_path / 'qdrant'}" if request.param == "folder" else server.url
    with node(redis_url, "qdrant", tmp_path, CLUSTER_VECTOR_URL=url, CLUSTER_ROLES="worker,cache") as app:
        yield sender(app)


def test_the_jobs_do_with_qdrant_what_they_do_without(run: Run) -> None:
    documents = [
        {"id": "sky", "text": "The sky is blue because air scatters blue light.", "metadata": {"topic": "physics"}},
        {"id": "cat", "text": "A cat sleeps for most of the day.", "metadata": {"topic": "animals", "legs": 4}},
        {"id": "hen", "text": "A hen lays three hundred eggs a year.", "metadata": {"topic": "animals", "legs": 2}},
    ]
    assert run("retrieval.add_documents", "docs", documents)["count"] == 3
    for mode in ("vector", "text", "hybrid"):
        found = run("retrieval.search", "docs", "why is the sky blue?", k=2, mode=mode)["passages"]
        assert (found[0]["id"], found[0]["metadata"]) == ("sky", {"topic": "physics"})
    found = run("retrieval.search", "docs", "sky", where={"topic": "animals", "legs": {"lt": 4}}, allow_partial=True)
    assert ([passage["id"] for passage in found["passages"]], found["missing"]) == (["hen"], [])
    text = "".join(f"# Part {n}\n\nA cat sleeps {n} hours. It sleeps {n} hours more.\n\n" for n in range(9))
    how = {"size": 60, "overlap": 0, "format": "markdown"}
    for size, passages in ((len(text), 9), (90, 2)):
        added = run("retrieval.add_documents", "docs", [{"id": "cat", "text": text[:size]}], split=how)
        assert added["passages"] == passages
    listed = run("retrieval.list_documents", "docs", limit=2)
    assert [(each["id"], each["passages"], each["complete"]) for each in listed["documents"]] == [
        ("cat", 2, True), ("hen", 1, True),
    ]  # fmt: skip
    answer = run("rag.answer", "How many eggs does a hen lay?", "docs", k=2)
    assert answer["passages"][0]["id"] == "hen"
    assert "three hundred eggs" in answer["text"]
    assert run("retrieval.delete_documents", "docs", ids=["cat"]) == {"deleted": 2}
    assert run("retrieval.optimize", "docs") == {"collections": ["docs"]}
    with pytest.raises(CollectionNotFound, match="did you mean 'docs'"):
        run("retrieval.search", "doc", "sky")
    with pytest.raises(InvalidArguments, match="orders numbers only"):
        run("retrieval.search", "docs", "sky", where={"topic": {"gt": "a"}})
