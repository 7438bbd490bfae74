"""Collections whose shards lie on several nodes: how many jobs a search is, and what the loss of a node costs it."""

from __future__ import annotations

import re
import signal
import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster_tasks.broker.message import job_of
from cluster_tasks.cluster import cluster_of
from cluster_tasks.errors import StoreUnavailable
from cluster_tasks.shards.catalogue import State
from cluster_tasks.shards.placement import Shard
from cluster_tasks.shards.resharding import _Beat
from cluster_tasks.tasks.kept import Embedded, kept_of
from cluster_tasks.testing import RERANK_PATH, FakeOpenAI
from tests.process.accounts import END_S
from tests.process.nodes import NEVER_LOST, WorkerProcess, running
from tests.process.sites import COUNT, DOCUMENTS, SHARDS, WORDS, Site, of_a_thread, searching, site_on
from tests.waiting import wait_until
from workers.redis_server import RedisServer

# Celery's own way to store a result that expires.
pytestmark = pytest.mark.filterwarnings("ignore:Call to deprecated setex")
PARTS = "retrieval.search_shards"


@pytest.fixture
def site(redis_server: RedisServer, tmp_path: Path) -> Iterator[Site]:
    """A cluster without nodes."""
    with site_on(redis_server.url, tmp_path) as made:
        yield made


def received(job: str, *nodes: WorkerProcess) -> list[int]:
    """How many jobs of this name each node was given, as its log tells."""
    return [len(re.findall(rf"Task {re.escape(job)}\[\S+ received", node.read_log())) for node in nodes]


@pytest.mark.parametrize("pool", ["threads", "prefork"])
def test_a_search_over_eight_shards_on_two_nodes_is_one_job_on_each(site: Site, pool: str) -> None:
    nodes = [site.new_node(name, pool=pool) for name in "ab"]
    with running(*nodes):
        site.fill()
        site.wait_until_ready(1, nodes=2)
        for number, mode in enumerate(("text", "hybrid", "vector"), start=1):
            found = site.get("retrieval.search", "docs", "the otter of house 5", k=12, mode=mode)
            assert sum(received(PARTS, *nodes)) == 2 * number
            assert sum(received("retrieval.merge", *nodes)) == number
            assert found == search_in_one_process(site, "the otter of house 5", 12, mode)
            # Where nothing is embedded the caller sends the parts itself.
            assert sum(received("retrieval.search", *nodes)) == number - 1
        assert site.get("retrieval.search", "docs", "otter", allow_partial=True)["missing"] == []
        wait_until(lambda: not list(site.app.backend.client.scan_iter("chord-unlock*")), END_S)
    assert "ERROR" not in "".join(node.read_log() for node in nodes)


def search_in_one_process(site: Site, query: str, k: int, mode: Any) -> Any:
    """What a search would have found that asks all shards itself."""
    import numpy as np

    vector = None if mode == "text" else np.asarray(site.get("embedding.embed", query)["vectors"][0])
    found = site.store.search("docs", vector, k, text=query, mode=mode)
    passages = [passage.model_dump(mode="json") for passage in found]
    return {"collection": "docs", "passages": passages, "cached": False}


def test_where_one_node_has_all_shards_a_search_is_one_job_there(site: Site) -> None:
    holder = site.new_node("a", **NEVER_LOST)
    other = site.new_node("b", CLUSTER_ROLES="worker", **NEVER_LOST)
    with running(holder, other):
        site.fill()
        site.wait_until_ready(1, nodes=1)
        # It has nothing to do, and could take a search that waits for the holder, if that is late.
        other.signal(signal.SIGSTOP)
        for number in range(10):
            assert len(site.ids("docs", f"house {number}")) == 5
        assert received(PARTS, holder, other) == [0, 0]
        assert received("retrieval.search", holder, other) == [10, 0]


@pytest.mark.parametrize("options", [{}, {"rerank": "local"}], ids=["as found", "reranked"])
def test_small_nodes_answer_questions_over_shards_of_others_without_waiting_for_each_other(
    site: Site, options: dict[str, str]
) -> None:
    nodes = [site.new_node(name, pool="solo", slots=1) for name in "ab"]
    with running(*nodes):
        site.fill()
        site.wait_until_ready(1, nodes=2)
        asked = [site.send("rag.answer", f"Where does the {word} live?", "docs", **options) for word in WORDS]
        for word, answer in zip(WORDS, [each.get(timeout=END_S) for each in asked], strict=True):
            assert len(answer["passages"]) == 5
            assert word in answer["passages"][0]["text"]
            assert [each["id"] for each in answer["citations"]][:1] == [answer["passages"][0]["id"]]
            assert ("rerank" in answer) == bool(options)
        assert sum(received(PARTS, *nodes)) == 2 * len(WORDS)


def test_what_nodes_found_waits_in_redis_for_a_reranker_without_room(site: Site) -> None:
    with FakeOpenAI() as server:
        limited = {
            "CLUSTER_RERANK_BASE_URL": server.base_url, "CLUSTER_RERANK_MODEL": "fake-rerank",
            "CLUSTER_RERANK_REQUESTS_PER_MINUTE": "1", "CLUSTER_PROVIDER_WAIT_S": "0", "NO_PROXY": "127.0.0.1",
        }  # fmt: skip
        nodes = [site.new_node(name, pool="solo", slots=1, **limited) for name in "ab"]
        with running(*nodes):
            site.fill()
            site.wait_until_ready(1, nodes=2)
            search = partial(site.send, "retrieval.search", "docs", mode="text", rerank=True, k=3)
            assert len(search("the otter of house 5").get(timeout=END_S)["passages"]) == 3
            waiting = search("the raven of house 6")
            wait_until(lambda: delayed_tasks(site) == ["retrieval.merge"], END_S)
            assert site.ids("docs", "otter", mode="text"), "it keeps no slot"
            # Room and its time come at once.
            cluster = site.cluster
            cluster.client.delete(cluster.keys.limits(f"rerank:fake-rerank@{server.base_url}"))
            for member in cluster.client.zrange(cluster.keys.delayed, 0, -1):
                cluster.client.zadd(cluster.keys.delayed, {member: 0}, xx=True)
            assert "raven" in waiting.get(timeout=END_S)["passages"][0]["text"]
            assert server.counts[RERANK_PATH] == 2
            assert sum(received(PARTS, *nodes)) == 6


def delayed_tasks(site: Site) -> list[str]:
    return [job.payload["headers"]["task"] for job in site.cluster.delayed()]


def test_a_shard_that_cannot_be_read_fails_a_search_unless_a_part_will_do(site: Site, tmp_path: Path) -> None:
    with running(site.new_node("a"), site.new_node("b")):
        site.fill()
        site.wait_until_ready(1, nodes=2)
        table = tmp_path / "data" / f"{site.store.layout('docs').table(3)}.lance"
        hidden = table.rename(tmp_path / "hidden")
        with pytest.raises(StoreUnavailable, match="3of8"):
            site.get("retrieval.search", "docs", "house", mode="text", k=COUNT)
        found = site.get("retrieval.search", "docs", "house", mode="text", k=COUNT, allow_partial=True)
        assert found["missing"] == [3]
        hidden.rename(table)
        rest = site.store.count("docs", [number for number in range(SHARDS) if number != 3])
        assert len(found["passages"]) == rest
        assert len(site.ids("docs", "house", mode="text", k=COUNT)) == COUNT


def test_what_a_search_over_nodes_found_is_kept_until_the_collection_changes(
    site: Site, redis_server: RedisServer
) -> None:
    url = redis_server.url.replace("/0", "/1")
    nodes = [site.new_node(name, CLUSTER_CACHE_URL=url, CLUSTER_CACHE_TIMEOUT_S="5") for name in "ab"]
    site.app.conf.update(cluster_cache_url=url, cluster_cache_timeout_s=5)
    with running(*nodes):
        site.fill()
        site.wait_until_ready(1, nodes=2)
        asked = partial(site.get, "retrieval.search", "docs", "house", mode="text", k=200)
        first = asked()
        assert (first["cached"], len(first["passages"])) == (False, COUNT)
        assert asked() == {**first, "cached": True}
        assert asked(allow_partial=True) == {**first, "cached": True, "missing": []}
        assert asked(cache="refresh")["cached"] is False
        assert sum(received(PARTS, *nodes)) == 4
        site.fill(documents=[{"id": "new", "text": "a house"}])
        assert "new" in [passage["id"] for passage in asked()["passages"]]
        assert sum(received(PARTS, *nodes)) == 6
        cluster_of(site.app).caches.close()


def test_a_kept_vector_that_does_not_fit_is_made_anew_before_nodes_are_asked(
    site: Site, redis_server: RedisServer
) -> None:
    url = redis_server.url.replace("/0", "/1")
    nodes = [site.new_node(name, CLUSTER_CACHE_URL=url, CLUSTER_CACHE_TIMEOUT_S="5") for name in "ab"]
    site.app.conf.update(cluster_cache_url=url, cluster_cache_timeout_s=5)
    with running(*nodes):
        site.fill()
        site.wait_until_ready(1, nodes=2)
        kept = kept_of(site.app)
        assert kept is not None
        for number, job in enumerate(("retrieval.search", "rag.answer"), start=1):
            question = f"Where does the otter live, asks {job}?"
            # From when the same name stood for another model.
            kept.keep_vectors({question: Embedded("local-hash", "local-hash", struct.pack("<2f", 1, 2))}, None)
            arguments = ("docs", question) if job == "retrieval.search" else (question, "docs")
            assert len(site.get(job, *arguments)["passages"]) == 5
            assert sum(received(PARTS, *nodes)) == 2 * number
        cluster_of(site.app).caches.close()


@of_a_thread
def test_a_shard_moves_and_a_collection_is_split_while_they_are_searched(site: Site) -> None:
    nodes = [site.new_node(name, replicas=2) for name in "abc"]
    with running(*nodes):
        site.fill()
        site.wait_until_ready(2, nodes=3)
        with searching(site) as searches:
            held = site.ready()
            least = min((node.id for node in nodes), key=lambda each: sum(each in on for on in held))
            moved = next(number for number, on in enumerate(held) if least not in on)
            site.cluster.shard_manager.move(Shard("docs", moved), least)
            wait_until(lambda: least in site.ready()[moved], END_S)
            site.store.split("docs", 3)
            wait_until(lambda: len(site.ready()) == 3, END_S, "the new layout is assigned")
            site.wait_until_ready(2)
            wait_until(searches.more(5), END_S)
    assert searches.wrong == []


def test_a_search_of_which_a_stopped_node_holds_a_part_is_done_by_another_before_it_is_lost(site: Site) -> None:
    # As good as never: nothing but a hedge ends such a search.
    nodes = {f"{name}@test": site.new_node(name, replicas=2, CLUSTER_LEASE_S="600") for name in "abc"}
    with running(*nodes.values()):
        site.fill()
        site.wait_until_ready(2, nodes=3)
        stopped, result = wait_until(partial(stopped_in_a_search, site, nodes), END_S, "a node is stopped in a search")
        found = {passage["id"] for passage in result.get(timeout=END_S)["passages"]}
        assert stopped.id in site.cluster.epochs.beats()
        assert found == {each["id"] for each in DOCUMENTS}
        assert given_hedges(site) > 0
        stopped.signal(signal.SIGCONT)
        wait_until(lambda: not hedging_keys(site), END_S, "nothing is left")
        assert site.cluster.stale_commits() == 0
    assert "ERROR" not in "".join(node.read_log() for node in nodes.values())


def stopped_in_a_search(site: Site, nodes: dict[str, WorkerProcess]) -> tuple[WorkerProcess, Any] | None:
    """Search, and stop a node that holds a part and has not ended it; return it and the search, if that was done."""
    result = site.send("retrieval.search", "docs", "house", mode="text", k=COUNT)
    beats = site.cluster.epochs.beats()
    held = [(node, site.cluster.keys.unacked(node_id, beats[node_id].epoch)) for node_id, node in nodes.items()]
    while not result.ready():
        for node, unacked in held:
            if holds_a_part(site, unacked):
                node.signal(signal.SIGSTOP)
                wait_until(partial(has_stopped, node.pid), END_S)
                if holds_a_part(site, unacked):
                    return node, result
                node.signal(signal.SIGCONT)
    return None


def has_stopped(pid: int) -> bool:
    return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)


def test_a_node_that_was_taken_for_dead_overwrites_nothing_that_came_after_its_job(site: Site) -> None:
    with FakeOpenAI() as server:
        models = {
            "CLUSTER_EMBEDDING_BASE_URL": server.base_url, "CLUSTER_EMBEDDING_MODEL": "fake-embedding",
            "NO_PROXY": "127.0.0.1",
        }  # fmt: skip
        nodes = {f"{name}@test": site.new_node(name, **models) for name in "ab"}
        with running(*nodes.values()):
            site.fill()
            beats = site.cluster.epochs.beats()
            unacked = {name: site.cluster.keys.unacked(name, beats[name].epoch) for name in nodes}
            server.hang()
            asked = len(server.requests)
            first = site.send("retrieval.add_documents", "docs", [{"id": "d", "text": "first"}])
            wait_until(lambda: len(server.requests) > asked, END_S, "it is being embedded")
            (holder,) = [node for name, node in nodes.items() if site.cluster.client.hlen(unacked[name])]
            holder.signal(signal.SIGSTOP)
            assert first.get(timeout=END_S)["count"] == 1, "the other node has done it"
            site.get("retrieval.add_documents", "docs", [{"id": "d", "text": "second"}])
            server.release()
            holder.signal(signal.SIGCONT)
            wait_until(lambda: "it must not change anything any more" in holder.read_log(), END_S, "it is refused")
            (stored,) = site.get("retrieval.get_documents", "docs", ["d"])["documents"]
            assert stored["text"] == "second"


def test_what_waits_for_the_end_of_a_split_keeps_no_search_from_the_slots(site: Site) -> None:
    node = site.new_node("a", pool="solo", slots=1)
    with running(node):
        site.fill()
        catalogue = site.store._catalogue
        entry = catalogue.read("docs")
        assert entry is not None
        splitting = catalogue.change(entry, state=State.SPLITTING)
        assert splitting is not None
        with _Beat(catalogue, splitting, 1.0) as beat:
            waiting = [site.send("retrieval.add_documents", "docs", [f"text {number}"]) for number in range(3)]
            waiting.append(site.send("retrieval.delete_documents", "docs", ["d1"]))
            wait_until(lambda: node.read_log().count("Retry in") >= len(waiting), END_S, "all have come back")
            assert len(site.ids("docs", "house")) == 5
            assert not any(each.ready() for each in waiting)
        assert catalogue.change(beat.entry, state=State.LIVE)
        assert [each.get(timeout=END_S) for each in waiting][-1] == {"deleted": 1}


def holds_a_part(site: Site, unacked: str) -> bool:
    """Whether a part of a search is among these deliveries that has not ended."""
    held: Any = site.cluster.client.hvals(unacked)
    parts = [job_of(message) for message in held if PARTS.encode() in message]
    return any(not site.cluster.client.exists(site.cluster.keys.terminal(job)) for job in parts)


def hedging_keys(site: Site) -> list[Any]:
    client, prefix = site.cluster.client, site.cluster.keys.name
    return [key for kind in ("hedge*", "unacked", "kept_end") for key in client.scan_iter(f"{prefix}:{kind}:*")]


def given_hedges(site: Site) -> int:
    return int(site.cluster.client.hget(site.cluster.keys.counters, "hedges") or 0)


@pytest.mark.parametrize("hedge", [True, False])
def test_few_searches_are_hedged_while_all_is_well(hedge: bool, site: Site) -> None:
    nodes = [site.new_node(name, replicas=2, CLUSTER_SEARCH_HEDGE=str(hedge)) for name in "abc"]
    site.app.conf.update(cluster_search_hedge=hedge)
    with running(*nodes):
        site.fill()
        site.wait_until_ready(2, nodes=3)
        for number in range(120 if hedge else 20):
            assert len(site.ids("docs", f"house {number}", mode="text")) == 5
        parts = sum(received(PARTS, *nodes))
        assert given_hedges(site) <= (0.1 * parts if hedge else 0)
        durations = site.cluster.client.lrange(site.cluster.keys.durations("docs"), 0, -1)
        assert len(durations) == (100 if hedge else 0)


def test_where_a_shard_is_in_one_memory_no_search_is_hedged(site: Site) -> None:
    nodes = [site.new_node(name) for name in "ab"]
    with running(*nodes):
        site.fill()
        site.wait_until_ready(1, nodes=2)
        for number in range(10):
            assert len(site.ids("docs", f"house {number}", mode="text")) == 5
        assert sum(received(PARTS, *nodes)) == 20
        assert given_hedges(site) == 0
        wait_until(lambda: not hedging_keys(site), END_S, "the last acknowledgement arrives")
        assert not site.cluster.client.exists(site.cluster.keys.durations("docs"))
