"""The ready-made jobs: ``generate.delay("Say hello.").get()["text"]``.

They belong to the current Celery app if that is in a cluster, else to the ready-made one, ``cluster_tasks.app:app``.
A node serves the request types of the jobs that its process has imported, so each module is loaded when one of its
jobs is asked for, and a user's app does not serve what it never uses.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster_tasks.tasks.embedding import embed
    from cluster_tasks.tasks.llm import generate
    from cluster_tasks.tasks.rag import answer
    from cluster_tasks.tasks.retrieval import add_documents, delete_documents, get_documents, list_documents, search
    from cluster_tasks.tasks.streams import follow, stream

__all__ = [
    "add_documents",
    "answer",
    "delete_documents",
    "embed",
    "follow",
    "generate",
    "get_documents",
    "list_documents",
    "search",
    "stream",
]

_HOMES = {
    "generate": "llm",
    "embed": "embedding",
    "add_documents": "retrieval",
    "search": "retrieval",
    "delete_documents": "retrieval",
    "get_documents": "retrieval",
    "list_documents": "retrieval",
    "answer": "rag",
    "follow": "streams",
    "stream": "streams",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
