"""What a question is searched for with, in jobs that are run here and now."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from cluster_tasks import Cluster
from cluster_tasks.cluster import cluster_of
from cluster_tasks.tasks import embedding, rag, retrieval
from cluster_tasks.testing import EMBEDDINGS_PATH, FakeOpenAI

# Celery's own way to store a result that expires.
pytestmark = pytest.mark.filterwarnings("ignore:Call to deprecated setex")
DECLARED = (embedding, rag, retrieval)
QUESTION = "What does an owl eat?"
Run = Callable[..., Any]


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeOpenAI]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with FakeOpenAI() as server:
        yield server


@pytest.fixture
def run(redis_url: str, tmp_path: Path, provider: FakeOpenAI) -> Iterator[Run]:
    """Runs a job, with a cache."""
    settings = {
        "data_dir": str(tmp_path / "data"), "cache_url": redis_url.replace("/0", "/1"),
        "embedding_base_url": provider.base_url, "embedding_model": "fake-embedding",
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
