"""Hybrid search finds better than either of its parts, on real texts and with embeddings that know meanings."""

from __future__ import annotations

from collections import Counter
from importlib.util import find_spec

import pytest

from benchmarks.docstrings import Docstrings, as_words, load
from benchmarks.relevance import beats_both, means, measure, ndcg
from cluster_tasks.providers import StaticEmbeddings
from tests.servers import missing


@pytest.fixture(scope="module")
def data() -> Docstrings:
    return load()


def test_no_passage_holds_the_summary_that_asks_for_it(data: Docstrings) -> None:
    summaries = [query for query in data.queries if query.kind == "summary"]
    assert not [query for query in summaries if any(query.text in data.passages[each] for each in query.relevant)]


def test_the_set_is_the_same_each_time_and_large_enough(data: Docstrings) -> None:
    assert load() == data
    assert len(data.passages) > 1000
    assert len(set(data.passages.values())) == len(data.passages)
    assert min(Counter((query.kind, query.half) for query in data.queries).values()) > 500
    assert all(query.relevant <= data.passages.keys() for query in data.queries)


def test_names_are_asked_for_as_words() -> None:
    names = ["read_text", "readText", "ReadText", "HTTPServer", "b64decode", "splitlines"]
    assert [as_words(name) for name in names] == [*["read text"] * 3, "http server", "b 64 decode", "splitlines"]


def test_the_measure_is_the_known_one() -> None:
    assert ndcg(["a", "b"], frozenset("a")) == 1
    assert ndcg(["b", "a"], frozenset("a")) == pytest.approx(0.6309, abs=1e-4)
    assert ndcg(["x", "b", "a"], frozenset("abc")) == pytest.approx(0.5307, abs=1e-4)
    assert ndcg([*"0123456789", "a"], frozenset("a")) == 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_hybrid_search_finds_better_than_vectors_and_better_than_words(data: Docstrings) -> None:
    if find_spec("wordllama") is None:
        missing("wordllama is not installed: cluster-tasks[static]")
    # Those on which nothing was chosen.
    others = [query for query in data.queries if query.half][::2]
    gains = means(measure(data, others, StaticEmbeddings()))
    assert beats_both(gains), gains
