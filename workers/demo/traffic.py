"""The jobs of the demo: three types, on passages of a corpus. Without the cache, but for those that show it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from workers.demo.corpus import SEED, Passage

COLLECTION = "demo"
OPTIMIZE = "retrieval.optimize"
INDEXED_AT_ONCE = 100
EMBEDDED_AT_ONCE = 16
READ_AT_ONCE = 24
"""Passages that one job embeds, and from which one answer is taken."""
FOUND = 10
REPEATED = 100
"""Jobs of each type in a pass that is repeated."""
SHARES = {"rag.answer": 0.12, "llm.generate": 0.28, "retrieval.search": 0.3, "embedding.embed": 0.3}


@dataclass(frozen=True, slots=True)
class Job:
    """A ready-made job and its arguments."""

    task: str
    arguments: dict[str, Any]


def indexing(passages: Sequence[Passage]) -> list[Job]:
    """Return the jobs that put all passages into the collection."""
    documents = [{"text": passage.text, "metadata": {"source": passage.source}} for passage in passages]
    return [
        Job("retrieval.add_documents", {"collection": COLLECTION, "documents": documents[at : at + INDEXED_AT_ONCE]})
        for at in range(0, len(documents), INDEXED_AT_ONCE)
    ]


def mixed(passages: Sequence[Passage], count: int) -> list[Job]:
    """Return ``count`` jobs on the collection, mixed, more than a tenth of them ``rag.answer``."""
    rng = random.Random(SEED)
    names = [name for name, share in SHARES.items() for _ in range(ceil(share * count))]
    jobs = [Job(name, _arguments(name, passages, rng)) for name in names[:count]]
    rng.shuffle(jobs)
    return jobs


def repeated(passages: Sequence[Passage]) -> list[Job]:
    """Return jobs that are all different, and whose results are kept."""
    rng = random.Random(SEED)
    jobs = []
    for number, passage in enumerate(rng.choices(passages, k=REPEATED)):
        question = f"{number}: {passage.beginning}"
        read = [passage.text for passage in rng.choices(passages, k=READ_AT_ONCE)]
        jobs += [
            Job("embedding.embed", {"texts": question}),
            Job("retrieval.search", {"collection": COLLECTION, "query": question, "k": FOUND}),
            Job("llm.generate", {"prompt": question, "passages": read, "temperature": 0, "max_tokens": 1_000}),
        ]
    return jobs


def _arguments(name: str, passages: Sequence[Passage], rng: random.Random) -> dict[str, Any]:
    question = rng.choice(passages).beginning
    match name:
        case "embedding.embed":
            return {"texts": [passage.text for passage in rng.choices(passages, k=EMBEDDED_AT_ONCE)], "cache": False}
        case "llm.generate":
            read = [passage.text for passage in rng.choices(passages, k=READ_AT_ONCE)]
            return {"prompt": question, "passages": read, "cache": False}
        case "retrieval.search":
            return {"collection": COLLECTION, "query": question, "k": FOUND, "cache": False}
        case _:
            return {"collection": COLLECTION, "question": question, "cache": False}
