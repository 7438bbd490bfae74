"""Five strategies on three pools: the same jobs of three types through real workers."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from celery import Celery, group

from cluster_tasks import Cluster
from cluster_tasks.app import JOBS
from cluster_tasks.balancing import strategy_names
from tests.process.nodes import WorkerProcess, running
from tests.servers import redis_for_results

END_S = 120.0
POOLS = ("prefork", "threads", "solo")
PASSAGES = ["Backups run at two in the morning.", "Logs are kept for a week.", "Nodes are restarted on Sundays."]

# An app knows the jobs of the modules that its process has imported.
for name in JOBS:
    import_module(f"cluster_tasks.tasks.{name}")


@pytest.fixture(scope="module", params=POOLS)
def app(
    request: pytest.FixtureRequest, redis_binary: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Celery]:
    """An app that sends to three nodes of one pool, which all strategies share: starting them is what takes time."""
    directory: Path = tmp_path_factory.mktemp(request.param)
    with (
        redis_for_results(directory / "redis") as server,
        Celery("caller", set_as_current=False, broker=server.url) as app,
    ):
        Cluster(app)
        environ = {"CLUSTER_DATA_DIR": str(directory / "data")}
        workers = [
            WorkerProcess(name, server.url, directory, app="cluster_tasks", pool=request.param, environ=environ)
            for name in "abc"
        ]
        with running(*workers):
            yield app


@pytest.mark.parametrize("strategy", ["adaptive", "consistent_hash", "least_connection", "round_robin", "weighted"])
def test_jobs_of_three_types_end_under_every_strategy_on_every_pool(strategy: str, app: Celery) -> None:
    tasks, by_strategy = app.tasks, {"headers": {"strategy": strategy}}
    documents = [{"id": f"{strategy}{number}", "text": text} for number, text in enumerate(PASSAGES)]
    collection = f"manual-{strategy.replace('_', '-')}"
    added = tasks["retrieval.add_documents"].apply_async((collection, documents), **by_strategy)
    assert added.get(timeout=END_S)["count"] == 3

    embedded = [tasks["embedding.embed"].apply_async((f"text {n}",), **by_strategy) for n in range(12)]
    found = [
        tasks["retrieval.search"].apply_async((collection,), {"query": "when do backups run", "k": 1}, **by_strategy)
        for _ in range(12)
    ]
    generated = [
        tasks["llm.generate"].apply_async(
            ("when do backups run?",), {"passages": PASSAGES, "session_id": f"session {n}"}, **by_strategy
        )
        for n in range(12)
    ]
    answered = tasks["rag.answer"].apply_async(("how long are logs kept?", collection), **by_strategy)

    assert {len(result.get(timeout=END_S)["vectors"]) for result in embedded} == {1}
    assert {result.get(timeout=END_S)["passages"][0]["text"] for result in found} == {PASSAGES[0]}
    assert all("two in the morning" in result.get(timeout=END_S)["text"] for result in generated)
    assert "a week" in answered.get(timeout=END_S)["text"]


def test_canvases_of_celery_work_across_nodes(app: Celery) -> None:
    embed, generate = app.tasks["embedding.embed"], app.tasks["llm.generate"]
    texts = group(embed.s(f"text {number}") for number in range(6)).apply_async().get(timeout=END_S)
    assert [len(result["vectors"]) for result in texts] == [1] * 6
    chained = embed.s("a question") | generate.si("when do backups run?", passages=PASSAGES)
    assert "morning" in chained.apply_async().get(timeout=END_S)["text"]


def test_the_five_strategies_are_all_there_are() -> None:
    assert strategy_names() == ("adaptive", "consistent_hash", "least_connection", "round_robin", "weighted")
