"""``celery -A APP cluster shards`` as a script meets it, on a real Redis and a real store."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from celery import Celery
from celery.bin.base import CLIContext
from click.testing import CliRunner, Result

from cluster_tasks import Cluster, Node, NodeRole
from cluster_tasks.cli.cluster import cluster as group
from cluster_tasks.cluster import cluster_of
from cluster_tasks.shards.documents import Document
from cluster_tasks.shards.keeper import ShardKeeper, tell_collections
from cluster_tasks.tasks.ready_made import backends_of

HOLDER = frozenset({NodeRole.WORKER, NodeRole.CACHE})


@pytest.fixture
def app(redis_url: str, tmp_path: Path) -> Iterator[Celery]:
    """With a collection docs of three shards, and the records of three nodes that can hold them."""
    with Celery("commands", set_as_current=False, broker=redis_url) as app:
        app.conf.update(cluster_data_dir=str(tmp_path / "data"), cluster_shards=3)
        cluster = Cluster(app)
        documents = [Document(id=f"d{number}", text=f"text {number}") for number in range(20)]
        backends_of(app).store.upsert("docs", documents, np.eye(20, 8), "model")
        for node_id in ("a@x", "b@x", "c@x"):
            epoch = cluster.epochs.open(node_id, ["retrieval"])
            cluster.registry.register(Node(id=node_id, roles=HOLDER, serves=frozenset({"retrieval"}), epoch=str(epoch)))
        yield app


def plan(app: Celery) -> None:
    tell_collections(cluster_of(app).assignments, backends_of(app).store)
    cluster_of(app).shard_manager.plan()


def load(app: Celery, node_id: str) -> None:
    cluster = cluster_of(app)
    ShardKeeper(node_id, cluster.assignments, lambda: backends_of(app).store, cluster.clock).step()


def ask(app: Celery, *words: str) -> Result:
    return CliRunner().invoke(group, ["shards", *words], obj=CLIContext(app, no_color=False, workdir=None))


def told(app: Celery, *words: str) -> Any:
    done = ask(app, *words, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_shards_are_listed_with_who_holds_them_who_is_ready_and_their_rows(app: Celery) -> None:
    assert told(app) == []
    plan(app)
    rows = told(app)
    assert [(row["collection"], row["shard"], row["ready"]) for row in rows] == [
        ("docs", number, []) for number in range(3)
    ]
    assert [len(row["holders"]) for row in rows] == [2, 2, 2]
    assert sum(row["rows"] for row in rows) == 20
    for node_id in ("a@x", "b@x", "c@x"):
        load(app, node_id)
    assert all(row["ready"] == sorted(row["holders"]) for row in told(app))
    lines = [line.split("\t") for line in ask(app).stdout.splitlines()]
    assert lines[0] == ["collection", "shard", "holders", "ready", "rows"]
    assert lines[1][2] == ",".join(rows[0]["holders"])


def test_a_store_that_cannot_be_read_from_here_hides_the_rows_only(app: Celery, tmp_path: Path) -> None:
    plan(app)
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    assert [row["rows"] for row in told(app)] == [None, None, None]


def test_where_no_node_holds_shards_it_is_said_which_would(redis_url: str, tmp_path: Path) -> None:
    with Celery("bare", set_as_current=False, broker=redis_url) as bare:
        bare.conf.update(cluster_data_dir=str(tmp_path))
        Cluster(bare)
        assert "CLUSTER_ROLES=worker,cache" in ask(bare).stderr


def test_a_store_that_cannot_be_used_is_named_and_not_redis(redis_url: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with Celery("lost", set_as_current=False, broker=redis_url) as lost:
        lost.conf.update(cluster_data_dir=str(tmp_path / "file" / "data"))
        Cluster(lost)
        complained = ask(lost, "split", "docs", "3").stderr
    assert f"(the collections are in {tmp_path / 'file' / 'data'}, from CLUSTER_DATA_DIR)" in complained


def test_a_shard_is_moved_to_a_node_by_its_name(app: Celery) -> None:
    plan(app)
    first, second = told(app)[1]["holders"]
    (free,) = {"a@x", "b@x", "c@x"} - {first, second}
    assert told(app, "move", "docs/1", free[0]) == {"collection": "docs", "shard": 1, "holders": [free, second]}
    assert told(app)[1]["holders"] == [free, second]
    assert ask(app, "move", "docs/1", second).stdout == f"docs/1 is held by {second}, {free}\n"


@pytest.mark.parametrize(
    ("words", "code", "named"),
    [
        (["move", "docs", "a"], 2, "COLLECTION/NUMBER"),
        (["move", "docs/7", "a"], 1, "docs/7"),
        (["move", "docs/0", "d"], 1, "'d'"),
        (["split", "docs", "0"], 2, "1<=x<=1024"),
        (["split", "dogs", "4"], 1, "did you mean 'docs'"),
    ],
)
def test_what_cannot_be_is_told_in_a_line(app: Celery, words: list[str], code: int, named: str) -> None:
    plan(app)
    done = ask(app, *words)
    assert (done.exit_code, done.stdout) == (code, "")
    assert named in done.stderr


def test_a_collection_is_split_and_its_new_shards_are_assigned(app: Celery) -> None:
    plan(app)
    assert told(app, "split", "docs", "5") == {"collection": "docs", "shards": 5, "generation": 2}
    cluster_of(app).shard_manager.plan()
    rows = told(app)
    assert [row["shard"] for row in rows] == list(range(5))
    assert sum(row["rows"] for row in rows) == 20
    kinds = [event.kind for event in cluster_of(app).events.latest()]
    assert kinds[-2:] == ["collection split", "shards assigned"]
