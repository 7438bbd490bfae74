"""Collections in a bucket, over S3's HTTP interface, which a server of this process speaks."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from moto.server import ThreadedMotoServer

from cluster_tasks.errors import StoreUnavailable
from cluster_tasks.shards.database import Database
from cluster_tasks.shards.documents import Document
from cluster_tasks.shards.store import CollectionStore

MODEL = "model-a"
WRITERS, EACH = 4, 5


@pytest.fixture(scope="module")
def s3() -> Iterator[ThreadedMotoServer]:
    """A server of buckets, without any."""
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def place(s3: ThreadedMotoServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a folder in an empty bucket that this process may use."""
    host, port = s3.get_host_and_port()
    for verb, path, status in (("POST", "/moto-api/reset", 200), ("PUT", "/bucket", 200)):
        connection = http.client.HTTPConnection(host, port, timeout=30)
        connection.request(verb, path)
        assert connection.getresponse().status == status
        connection.close()
    environ = {
        "AWS_ENDPOINT": f"http://{host}:{port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "secret",
    }
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    return "s3://bucket/data"


def add(store: CollectionStore, *ids: str, text: str = "a barn") -> int:
    return store.upsert("docs", [Document(id=each, text=text) for each in ids], np.ones((len(ids), 3)), MODEL)


def test_documents_are_stored_found_replaced_and_deleted(place: str) -> None:
    store = CollectionStore(place, shards=2)
    assert store.collections() == []
    add(store, "a", "b", "c")
    add(store, "b", text="a shed")
    # Another process has nothing in memory.
    other = CollectionStore(place)
    assert other.collections() == ["docs"]
    assert [passage.id for passage in other.search("docs", text="shed", mode="text")] == ["b"]
    assert {passage.id for passage in other.search("docs", np.ones(3), 5)} == {"a", "b", "c"}
    assert other.delete("docs", ["a"]) == 1
    assert store.count("docs") == 2
    store.drop("docs")
    assert other.collections() == []


def test_writers_at_once_lose_nothing_also_while_the_collection_is_split_and_compacted(place: str) -> None:
    add(CollectionStore(place, shards=2), "first")

    def write(writer: int) -> None:
        store = CollectionStore(place)
        for number in range(EACH):
            add(store, f"{writer}-{number}")

    with ThreadPoolExecutor(WRITERS) as threads:
        written = [threads.submit(write, writer) for writer in range(WRITERS)]
        store = CollectionStore(place)
        assert store.split("docs", 3).shards == 3
        store.optimize("docs")
        for each in written:
            each.result()
    assert sorted(each for each, _ in store.scan("docs")) == sorted(
        ["first", *(f"{writer}-{number}" for writer in range(WRITERS) for number in range(EACH))]
    )


def test_a_bucket_that_is_not_there_is_named(place: str) -> None:
    with pytest.raises(StoreUnavailable, match="elsewhere"):
        add(CollectionStore(place.replace("bucket", "elsewhere")), "a")
    with pytest.raises(StoreUnavailable, match="elsewhere"):
        Database("s3://elsewhere/data").names()
