"""Documents that several add at once, run here and now; see test_tasks for jobs on nodes."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from cluster_tasks import Cluster
from cluster_tasks.tasks import retrieval

DECLARED = (retrieval,)
SPLIT = {"size": 16, "overlap": 0}
ROUNDS = 12


@pytest.fixture
def app(redis_url: str, tmp_path: Path) -> Iterator[Celery]:
    with Celery("adds", set_as_current=False, broker=redis_url) as app:
        app.conf.update(cluster_data_dir=str(tmp_path), cluster_shards=4)
        Cluster(app)
        yield app


def text_of(word: str, passages: int) -> str:
    return " ".join(f"{word}{number:02} and so on." for number in range(passages))


def test_of_two_that_replace_a_document_at_once_one_wins_as_a_whole(app: Celery) -> None:
    add, listed = (app.tasks[f"retrieval.{name}_documents"] for name in ("add", "list"))
    several = [text_of("a", 4), text_of("b", 12), text_of("c", 12)]
    with ThreadPoolExecutor(len(several)) as pool:
        for _ in range(ROUNDS):
            sent = [pool.submit(add, "docs", [{"id": "d", "text": text}], split=SPLIT) for text in several]
            assert sorted(each.result()["passages"] for each in sent) == [4, 12, 12]
            (document,) = listed("docs")["documents"]
            assert document["complete"], document
            ids = [f"d#passage-{number}" for number in range(document["passages"])]
            (word,) = {each["text"][0] for each in app.tasks["retrieval.get_documents"]("docs", ids)["documents"]}
            assert document["passages"] == (4 if word == "a" else 12)


def test_a_document_that_is_added_anew_while_it_is_deleted_is_not_left_in_part(
    app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    add, delete, listed = (app.tasks[f"retrieval.{name}_documents"] for name in ("add", "delete", "list"))
    read, larger = retrieval._passage_ids, iter([5, 7])

    def and_then_add(*args: Any) -> list[str]:
        found = read(*args)
        if (passages := next(larger, None)) is not None:
            add("docs", [{"id": "d", "text": text_of("b", passages)}], split=SPLIT)
        return found

    add("docs", [{"id": "d", "text": text_of("a", 3)}, {"id": "e", "text": text_of("e", 3)}], split=SPLIT)
    monkeypatch.setattr(retrieval, "_passage_ids", and_then_add)
    deleted = delete("docs", ["d"])
    assert [(document["id"], document["complete"]) for document in listed("docs")["documents"]] == [("e", True)]
    assert deleted == {"deleted": 3 + 2 + 5}


def test_passages_that_a_filter_spares_are_left(app: Celery) -> None:
    add, delete, listed = (app.tasks[f"retrieval.{name}_documents"] for name in ("add", "delete", "list"))
    add("docs", [{"id": "d", "text": text_of("a", 3)}], split=SPLIT)
    assert delete("docs", ["d"], {"passage": {"gte": 1}}) == {"deleted": 2}
    (document,) = listed("docs")["documents"]
    assert (document["passages"], document["complete"]) == (1, False)
