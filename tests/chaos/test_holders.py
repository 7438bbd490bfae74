"""Nodes that hold shards die in the middle of writes and searches, again and again."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.chaos.conftest import ByLevel
from tests.chaos.levels import REMARK, percentile
from tests.chaos.stalls import Stalls
from tests.process.accounts import END_S
from tests.process.nodes import running
from tests.process.sites import DOCUMENTS, Site, of_a_thread, searching, site_on
from tests.waiting import wait_until
from workers.redis_server import RedisServer

REPLICATED_S = 10.0
"""So soon after a kill every shard of 50,000 documents is in memory on two nodes again, on a machine that keeps up."""
ADDED, BATCH = 20, 1_000


@pytest.fixture
def site(redis_server: RedisServer, tmp_path: Path) -> Iterator[Site]:
    """A cluster without nodes."""
    with site_on(redis_server.url, tmp_path) as made:
        yield made


@pytest.mark.chaos("core")
@pytest.mark.timeout(2400)
@of_a_thread
# Celery's own way to store a result that expires.
@pytest.mark.filterwarnings("ignore:Call to deprecated setex")
def test_the_loss_of_a_holder_loses_no_document_and_fails_no_search(
    site: Site, by_level: ByLevel, rng: random.Random, record_property: Callable[[str, object], None]
) -> None:
    # Three full runs, of a seed each, make fifty rounds. Beside other tests it measures while the machine is quiet.
    rounds, documents = by_level(core=1, short=2, full=17), by_level(core=0, full=50_000)
    nodes = {name: site.new_node(name, replicas=2) for name in "abc"}
    taken: list[tuple[float, float]] = []
    with running(*nodes.values()), Stalls() as stalls:
        site.fill()
        for start in range(0, documents, BATCH):
            site.fill(documents=[{"id": f"more-{start + each}", "text": f"shed {each}"} for each in range(BATCH)])
        site.wait_until_ready(2, nodes=3)
        with searching(site) as searches:
            for number in range(rounds):
                added = [
                    site.send("retrieval.add_documents", "docs", [{"id": f"{number}-{each}", "text": "a barn"}])
                    for each in range(ADDED)
                ]
                time.sleep(rng.uniform(0, 0.5))  # A random instant is what this is about.
                victim = rng.choice(sorted(nodes))
                nodes[victim].kill()
                killed_at = time.time()
                wait_until(lambda gone=victim: is_replaced(site, gone), END_S, "the others have all shards in memory")
                taken.append((killed_at, time.time() - killed_at))
                assert [each.get(timeout=END_S)["count"] for each in added] == [1] * ADDED
                wait_until(searches.more(5), END_S)
                nodes[victim].start().wait_ready()
                site.wait_until_ready(2, nodes=3)
        assert searches.wrong == []
        expected = {each["id"] for each in DOCUMENTS} | {f"more-{each}" for each in range(documents)}
        expected |= {f"{number}-{each}" for number in range(rounds) for each in range(ADDED)}
        stored = [each for each, _ in site.store.scan("docs")]
        assert len(stored) == len(set(stored))
        assert set(stored) == expected
        assert len(site.ids("docs", "barn", mode="text", k=rounds * ADDED + 1)) == rounds * ADDED
    quiet = [took_s for at, took_s in taken if not stalls.during(at, at + took_s)] or [0.0]
    record_property(
        REMARK,
        f"{len(taken)} holders killed, {searches.done} searches; {len(quiet)} measured, in memory on two nodes again "
        f"p50 {percentile(quiet, 0.5):.2f} most {max(quiet):.2f} s after the kill",
    )
    if by_level(core=False, full=True):
        assert max(quiet) <= REPLICATED_S


def is_replaced(site: Site, victim: str) -> bool:
    """Whether every shard is in memory on two others."""
    found = site.cluster.assignments.whereabouts("docs")
    assert found is not None
    held = zip(found.assigned.nodes, found.ready, strict=True)
    return all(f"{victim}@test" not in nodes and len(nodes) == 2 and ready >= set(nodes) for nodes, ready in held)
