"""The two jobs of which a search over nodes is made, run here and now; see tests/process for nodes that search."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from celery import Celery

from cluster_tasks import Cluster
from cluster_tasks.errors import (
    CollectionMismatch,
    CollectionNotFound,
    InvalidArguments,
    LayoutChanged,
    SearchIncomplete,
    StoreUnavailable,
)
from cluster_tasks.shards.documents import Document, Mode
from cluster_tasks.shards.shard_map import Shares
from cluster_tasks.shards.store import CollectionStore
from cluster_tasks.tasks import rag, retrieval
from cluster_tasks.tasks.fanout import MERGE, SEARCH_SHARDS, Asked, asking, jobs_of, search_here
from cluster_tasks.tasks.ready_made import backends_of

# Celery's own way to store a result that expires.
pytestmark = pytest.mark.filterwarnings("ignore:Call to deprecated setex")
DECLARED = (rag, retrieval)
SHARDS, GENERATION, SIZE = 4, 1, 6
WORDS = ["whale", "eagle", "mouse", "tiger", "zebra"]


@pytest.fixture
def app(redis_url: str, tmp_path: Path) -> Iterator[Celery]:
    """With a collection docs of four shards."""
    with Celery("searches", set_as_current=False, broker=redis_url) as app:
        app.conf.update(cluster_data_dir=str(tmp_path / "data"), cluster_shards=SHARDS)
        Cluster(app)
        vectors = np.random.default_rng(7).normal(size=(60, SIZE))
        documents = [
            Document(id=f"d{number}", text=f"{WORDS[number % 5]} number {number}", metadata={"even": number % 2 == 0})
            for number in range(60)
        ]
        store_of(app).upsert("docs", documents, vectors, "model")
        yield app


def store_of(app: Celery) -> CollectionStore:
    return backends_of(app).store


def ask(mode: Mode, *, collection: str = "docs", size: int = SIZE, where: dict[str, Any] | None = None) -> Asked:
    vector = None if mode == "text" else [1.0, *[0.5] * (size - 1)]
    return asking(collection, 7, where, mode, None if mode == "vector" else "a whale", vector, None)


def part(app: Celery, asked: Asked, *shards: int, generation: int = GENERATION, **options: Any) -> Any:
    """What a node says of shards, as it comes out of its result."""
    said = json.loads(json.dumps(app.tasks[SEARCH_SHARDS](asked, generation, list(shards), **options)))
    # What is run here and now is no job.
    return {**said, "job": f"part-{shards}"}


def merged(app: Celery, asked: Asked, *parts: Any, **options: Any) -> Any:
    return app.tasks[MERGE](list(parts), asked, **options)


def hide(app: Celery, tmp_path: Path, shard: int) -> None:
    """Let a shard become unreadable."""
    (tmp_path / "data" / f"{store_of(app).layout('docs').table(shard)}.lance").rename(tmp_path / f"hidden-{shard}")


@pytest.mark.parametrize("mode", ["vector", "text", "hybrid"])
@pytest.mark.parametrize("where", [None, {"even": True}])
def test_what_nodes_find_is_merged_to_what_one_would_have_found(
    app: Celery, mode: Mode, where: dict[str, Any] | None
) -> None:
    asked = ask(mode, where=where)
    found = merged(app, asked, part(app, asked, 0, 3), part(app, asked, 1), part(app, asked, 2))
    assert found == {**search_here(app, asked), "cached": False}
    # Six whales have an even number.
    assert len(found["passages"]) == (6 if mode == "text" and where else 7)
    whole = merged(app, asked, part(app, asked, 0, 1, 2, 3), allow_partial=True)
    assert whole == {**found, "missing": []}


@pytest.mark.parametrize("mode", ["text", "hybrid"])
def test_what_nodes_find_is_ranked_when_it_is_merged(app: Celery, mode: Mode) -> None:
    asked: Asked = {**ask(mode), "rerank": {"model": "local", "candidates": 20, "allow_degraded": True}}
    found = merged(app, asked, part(app, asked, 0, 3), part(app, asked, 1, 2))
    assert found == {**search_here(app, asked), "cached": False}
    assert len(found["passages"]) == 7
    assert found["rerank"]["model"] == "local-mmr"
    stale = part(app, asked, 0, 1, generation=GENERATION + 1)
    assert merged(app, asked, stale, part(app, asked, 2, 3)) == found


def test_a_part_that_fails_fails_the_search_unless_a_partial_result_will_do(app: Celery, tmp_path: Path) -> None:
    asked = ask("hybrid")
    hide(app, tmp_path, 2)
    with pytest.raises(StoreUnavailable, match="2of4"):
        merged(app, asked, part(app, asked, 0, 2), part(app, asked, 1, 3))
    parts = [part(app, asked, *shards, allow_partial=True) for shards in ([0, 2], [1, 3])]
    found = merged(app, asked, *parts, allow_partial=True)
    assert found["missing"] == [2]
    assert found["passages"] == merged(app, asked, part(app, asked, 0, 1, 3))["passages"]
    assert search_here(app, asked, allow_partial=True) == {key: found[key] for key in found if key != "cached"}
    with pytest.raises(StoreUnavailable):
        search_here(app, asked)


@pytest.mark.parametrize("rerank", [None, {"model": "local", "candidates": 20, "allow_degraded": True}])
def test_where_texts_are_long_they_are_read_when_it_is_known_which(app: Celery, rerank: Any) -> None:
    asked: Asked = {**ask("hybrid"), **({"rerank": rerank} if rerank else {})}
    whole = [part(app, asked, 0, 3), part(app, asked, 1, 2)]
    bare = [part(app, {**asked, "room": 100}, *shards) for shards in ([0, 3], [1, 2])]
    assert len(json.dumps(bare)) < 0.8 * len(json.dumps(whole))
    assert not any(each["text"] for one in bare for found in one["found"] for each in found["nearest"])
    found = merged(app, asked, *bare)
    assert found == merged(app, asked, *whole)
    store_of(app).delete("docs", [found["passages"][0]["id"]])
    assert found["passages"][0] not in merged(app, asked, *bare)["passages"]


def test_what_nodes_send_to_the_merge_fits_into_its_message(app: Celery) -> None:
    nodes = {f"n{number}": [0] for number in range(40)}
    jobs = jobs_of(app, Shares(GENERATION, nodes, {}, 1.0), ask("text"), None, None)
    rooms = {each.args[0]["room"] for each in jobs.tasks}
    assert len(rooms) == 1
    assert len(nodes) * rooms.pop() < backends_of(app)._settings.max_message_bytes / 2


def test_a_part_that_is_late_searches_nothing(app: Celery) -> None:
    asked = ask("vector")
    late = part(app, asked, 1, 2, deadline=time.time() - 1)
    rest = part(app, asked, 0, 3, deadline=time.time() + 600)
    assert (late["found"], late["missing"], rest["missing"]) == ([], [1, 2], [])
    with pytest.raises(SearchIncomplete, match="'docs' were not searched in time"):
        merged(app, asked, late, rest)
    found = merged(app, asked, late, rest, allow_partial=True)
    assert found["missing"] == [1, 2]
    assert len(found["passages"]) == 7


def test_what_is_wrong_with_all_shards_is_no_partial_result(app: Celery, tmp_path: Path) -> None:
    asked = ask("vector", size=SIZE + 1)
    hide(app, tmp_path, 0)
    parts = [part(app, asked, shard, allow_partial=True) for shard in range(SHARDS)]
    with pytest.raises(CollectionMismatch, match="7 dimensions"):
        merged(app, asked, *parts, allow_partial=True)
    with pytest.raises(InvalidArguments, match="surrogates"):
        merged(app, ask("text"), part(app, {**ask("text"), "text": "\ud800"}, 0), allow_partial=True)
    nowhere = ask("vector", collection="dogs")
    with pytest.raises(CollectionNotFound, match="did you mean 'docs'"):
        merged(app, nowhere, part(app, nowhere, 0), part(app, nowhere, 1), allow_partial=True)


def test_a_collection_that_was_divided_anew_meanwhile_is_searched_as_it_is_now(app: Celery) -> None:
    asked = ask("hybrid")
    stale = part(app, asked, 0, 1, generation=GENERATION + 1)
    assert stale["error"][0] == LayoutChanged.__name__
    found = merged(app, asked, stale, part(app, asked, 2, 3))
    assert found == {**search_here(app, asked), "cached": False}


def test_the_results_of_parts_are_forgotten_when_they_are_merged(app: Celery) -> None:
    asked = ask("text")
    parts = [part(app, asked, shard) for shard in range(SHARDS)]
    for each in parts:
        app.backend.store_result(each["job"], each, "SUCCESS")
    merged(app, asked, *parts)
    assert [app.backend.get_task_meta(each["job"])["status"] for each in parts] == ["PENDING"] * SHARDS
