"""What the caller of a search puts on which lists; no node runs here that would take it."""

from __future__ import annotations

import base64
import gc
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from celery import Celery

from cluster_tasks import Cluster, ClusterTask, Node, NodeRole
from cluster_tasks.cluster import cluster_of
from cluster_tasks.model import Load
from cluster_tasks.shards.assignments import Assigned
from cluster_tasks.shards.placement import Shard
from cluster_tasks.tasks import rag, retrieval
from cluster_tasks.tasks.base import expiry

# Celery's own way to store a result that expires.
pytestmark = pytest.mark.filterwarnings("ignore:Call to deprecated setex")
DECLARED = (rag, retrieval)
GENERATION = 1
PRIORITY = 6


@pytest.fixture
def app(redis_url: str) -> Iterator[Celery]:
    """With the records of the nodes a, b and c."""
    with Celery("caller", set_as_current=False, broker=redis_url) as app:
        app.conf.update(cluster_snapshot_s=0.01)
        cluster = Cluster(app)
        for node_id in "abc":
            epoch = str(cluster.epochs.open(node_id, ["retrieval"]))
            # The strategy alone would choose c.
            load = Load(current_connections=0 if node_id == "c" else 1)
            roles = frozenset({NodeRole.WORKER, NodeRole.CACHE})
            cluster.registry.register(
                Node(id=node_id, roles=roles, serves=frozenset({"retrieval"}), epoch=epoch, load=load)
            )
        cluster.view.refresh()
        yield app


def hold(app: Celery, *nodes: str) -> None:
    """Let each shard of docs be ready on the nodes of a letter each."""
    table, epochs = cluster_of(app).assignments, cluster_of(app).epochs.beats()
    table.write("", {"docs": Assigned(GENERATION, tuple(map(tuple, nodes)))})
    for number, held in enumerate(nodes):
        for node_id in held:
            table.report(node_id, epochs[node_id].epoch, GENERATION, [Shard("docs", number)])


def sent(app: Celery) -> dict[str, list[tuple[str, Any]]]:
    """The jobs in the lists, with their arguments; of chords only the headers are there yet."""
    cluster = cluster_of(app)
    lists: dict[str, list[tuple[str, Any]]] = {}
    for queue in cluster.epochs.lengths():
        for suffix in ("", f"\x06\x16{PRIORITY}"):
            for message in cluster.client.lrange(queue + suffix, 0, -1):
                payload = json.loads(message)
                args, kwargs, _ = json.loads(base64.b64decode(payload["body"]))
                lists.setdefault(queue + suffix, []).append((payload["headers"]["task"], args or kwargs))
    return lists


def names(app: Celery) -> dict[str, list[str]]:
    return {queue: [name for name, _ in jobs] for queue, jobs in sent(app).items()}


def test_a_search_goes_to_a_node_that_has_all_shards(app: Celery) -> None:
    hold(app, "a", "ab", "a")
    app.tasks["retrieval.search"].delay("docs", "a query")
    app.tasks["retrieval.search"].delay("docs", "words", mode="text")
    app.tasks["rag.search"].delay(None, "docs", 5, None, "words", "text")
    lists = names(app)
    assert lists.keys() == {"node.a"}
    assert sorted(lists["node.a"]) == ["rag.search", "retrieval.search", "retrieval.search"]


def test_a_search_that_embeds_nothing_is_sent_to_each_node_that_is_to_search(app: Celery) -> None:
    hold(app, "a", "b", "a", "b")
    result = app.tasks["retrieval.search"].apply_async(
        ("docs",), {"vector": [1.0, 2.0]}, task_id="mine", expires=600, priority=PRIORITY
    )
    assert (result.id, result.parent, result.state) == ("mine", None, "PENDING")
    lists = sent(app)
    assert {queue: [name for name, _ in jobs] for queue, jobs in lists.items()} == {
        f"node.{node_id}\x06\x16{PRIORITY}": ["retrieval.search_shards"] for node_id in "ab"
    }
    asked, generation, shards, node_id, deadline, allow_partial = lists[f"node.a\x06\x16{PRIORITY}"][0][1]
    assert (asked["collection"], asked["vector"], asked["k"], asked["mode"]) == ("docs", [1.0, 2.0], 5, "vector")
    assert (generation, shards, node_id, allow_partial) == (GENERATION, [0, 2], "a", False)
    assert 0 < deadline - datetime.now(UTC).timestamp() <= 600


def test_a_caller_listens_for_the_search_and_not_for_its_parts(app: Celery) -> None:
    hold(app, "a", "b")
    result = app.tasks["retrieval.search"].delay("docs", vector=[1.0])
    consumer = app.backend.result_consumer
    app.backend.add_pending_result(result)
    assert consumer.subscribed_to == {app.backend.get_key_for_task(result.id)}
    gc.collect()
    assert consumer.subscribed_to == {app.backend.get_key_for_task(result.id)}


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ({"query": "a query"}, {}),
        ({"vector": [1.0], "k": 5_000}, {}),
        ({"vector": [1.0]}, {"countdown": 60}),
        ({"vector": [1.0]}, {"headers": {"strategy": "round_robin"}}),
        ({"vector": [1.0]}, {"ignore_result": True}),
    ],
    ids=["embeds", "wide", "later", "strategy", "no result"],
)
def test_other_searches_are_one_job_that_sees_for_itself(
    app: Celery, arguments: dict[str, Any], options: dict[str, Any]
) -> None:
    hold(app, "a", "b")
    app.tasks["retrieval.search"].apply_async(("docs",), arguments, **options)
    jobs = [name for listed in names(app).values() for name in listed]
    assert jobs == ([] if "countdown" in options else ["retrieval.search"])


def test_a_node_that_cannot_be_given_jobs_is_not_preferred(app: Celery) -> None:
    hold(app, "a", "a")
    cluster_of(app).epochs.set_draining("a", True)
    cluster_of(app).view.refresh()
    app.tasks["retrieval.search"].delay("docs", "a query")
    assert names(app) == {"node.c": ["retrieval.search"]}


def test_a_preference_that_cannot_be_told_is_none(app: Celery) -> None:
    @app.task(base=ClusterTask, request_type="retrieval", shared=False, name="own", prefers=lambda app, node: node[0])
    def own(node: str) -> None: ...

    own.delay("bcd")
    own.delay(node="")
    assert names(app) == {"node.b": ["own"], "node.c": ["own"]}


def test_an_expiry_is_understood_as_celery_does() -> None:
    now = datetime.now(UTC)
    berlin = datetime.now().astimezone().tzinfo
    assert expiry(None) is None
    assert expiry(now) == now.timestamp()
    assert expiry(now.isoformat()) == now.timestamp()
    assert expiry(now.replace(tzinfo=None)) == now.timestamp()
    assert expiry(now.astimezone(berlin)) == now.timestamp()
    in_a_minute = expiry(60)
    assert in_a_minute is not None
    assert in_a_minute >= (now + timedelta(seconds=60)).timestamp()
