"""The vector that a question is searched for with: one that fits the collection."""

from __future__ import annotations

from typing import Any

from celery import Celery

from cluster_tasks.errors import CollectionMismatch
from cluster_tasks.tasks.arguments import CacheUse
from cluster_tasks.tasks.embedding import embed_texts
from cluster_tasks.tasks.ready_made import backends_of


def query_vector(app: Celery, collection: str, query: str, cache: CacheUse) -> tuple[Any, str]:
    """Return the vector of a query and the model that made it. Raises as ``embedding.embed`` and ``fitting`` do."""
    made = embed_texts(app, [query], cache=cache)
    return fitting(app, collection, query, made.vectors[0], made.model, cached=made.cached)


def fitting(app: Celery, collection: str, query: str, vector: Any, model: str, *, cached: bool) -> tuple[Any, str]:
    """Return the vector of a query and its model: made anew, if it was kept and is not of the collection's model.

    It may be from when the same name stood for another model. Raises CollectionNotFound and StoreUnavailable, and if
    it is made anew as ``embedding.embed`` does.
    """
    if not cached:
        return vector, model
    try:
        backends_of(app).store.check_fit(collection, len(vector), model)
    except CollectionMismatch:
        made = embed_texts(app, [query], cache="refresh")
        return made.vectors[0], made.model
    return vector, model
