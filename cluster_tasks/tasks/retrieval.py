"""``retrieval.*``: collections of documents are filled, searched and cleared."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from itertools import chain
from time import sleep
from typing import TYPE_CHECKING, Any

from celery import Celery
from celery.canvas import Signature
from celery.utils import uuid

from cluster_tasks.errors import CollectionNotFound, ConfigurationError, LockLost, LockTaken, StoreUnavailable
from cluster_tasks.shards.documents import Document, Mode
from cluster_tasks.shards.ingest.splitting import ADDED_BY, WHOLE, Split, document_of
from cluster_tasks.shards.ingest.splitting import split as split_document
from cluster_tasks.shards.ingest.wholes import wholes
from cluster_tasks.tasks.apps import cluster_of
from cluster_tasks.tasks.arguments import (
    OPTIMIZE_WITHIN_S,
    AddArguments,
    CacheUse,
    DeleteArguments,
    GetArguments,
    ListArguments,
    OptimizeArguments,
    Rerank,
    SearchArguments,
)
from cluster_tasks.tasks.base import ClusterTask
from cluster_tasks.tasks.embedding import embed_texts
from cluster_tasks.tasks.fanout import (
    Asked,
    asking,
    best_node,
    jobs_of,
    search_here,
    search_nodes,
    shares_for,
    shares_of,
)
from cluster_tasks.tasks.kept import kept_of
from cluster_tasks.tasks.queries import query_vector
from cluster_tasks.tasks.ready_made import backends_of, ready_made
from cluster_tasks.tasks.reranking import Reranking, reranking_of

if TYPE_CHECKING:
    from cluster_tasks.providers import EmbeddingResult
    from cluster_tasks.shards.vector_store import VectorStore

OPTIMIZING_S = 300.0
"""So long nobody else optimizes what a node has begun to, and died. Two at once do no harm: one works in vain."""
TRIES = 10
"""To leave each document whole, or none of it, while others change the same ones."""
logger = logging.getLogger(__name__)


@ready_made("retrieval.add_documents", request_type="retrieval", affinity="collection", arguments=AddArguments)
def add_documents(
    task: ClusterTask, collection: str, documents: Sequence[Document], split: Split | None = None
) -> dict[str, Any]:
    """Embed documents and put them into a collection, which is made if there is none.

    A document is a text or a mapping of ``text`` and, as far as wanted, ``id`` and ``metadata``. Those of an id that
    the collection holds are replaced; without an id, equal text and metadata have an equal id. So a job that is run
    again after a crash changes nothing.

    With ``split`` a document of any length is stored in passages: ``{"size": 1000, "overlap": 100, "unit":
    "characters", "format": "text"}`` are its defaults. ``unit`` may be ``"tokens"``, those of OpenAI's embedding
    models; ``format`` ``"markdown"`` or ``"python"``, which are cut at headings and definitions. A passage is found,
    with the metadata of its document and ``document`` (the id of that), ``passage``, ``passages``, ``start`` and, where
    known, ``heading`` and ``page``; its id is that of the document, ``#passage-`` and its number; ``added_by`` is the
    id of this job. The document stays one thing: its id replaces all of it, whether the new text has more passages or
    fewer, and deletes all of it. The new passages are there before the old ones go; of two jobs that replace a document
    at once, one wins as a whole. Without ``split``, a document replaces none that was split: both are found.

    Returns ``collection``, ``ids`` (in the order of the documents), ``count`` (of different ids) and, with ``split``,
    ``passages``, their number. Fails as ``embedding.embed`` does and with CollectionMismatch; with LockTaken or
    StaleWriter if others keep writing to the same shards, and with StoreUnavailable: then it is to be repeated.
    """
    ids = [document.id for document in documents]
    if not documents:
        return {"collection": collection, "ids": ids, "count": 0}
    try:
        if split is None:
            return {"collection": collection, "ids": ids, "count": _store(task, collection, documents)}
        job_id = task.request.id or uuid()
        pieces = {document.id: split_document(document, split, job_id) for document in documents}
        _replace(task, collection, pieces, job_id)
        return {"collection": collection, "ids": ids, "count": len(pieces), "passages": sum(map(len, pieces.values()))}
    finally:
        # What has failed may have changed something.
        _forget_searches(task.app, collection)


def _store(task: ClusterTask, collection: str, documents: Sequence[Document]) -> int:
    embedded = _embedded(task.app, collection, documents)
    store = backends_of(task.app).store
    return store.upsert(collection, documents, embedded.vectors, embedded.model, check=task.delivery_check())


def _embedded(app: Celery, collection: str, documents: Sequence[Document]) -> EmbeddingResult:
    # Whoever has to come back is to pay for it once.
    backends_of(app).store.ready(collection)
    return embed_texts(app, [document.text for document in documents])


def _replace(task: ClusterTask, collection: str, pieces: Mapping[str, Sequence[Document]], job_id: str) -> None:
    """Put the passages of each document in the place of all that is stored of it.

    Another job may replace the same document meanwhile, and neither sees the other write. So whoever has changed
    something looks afterwards whether all is of one job, whichever, and begins anew if not: the last one who changes
    something has seen all that there is.
    """
    store, check = backends_of(task.app).store, task.delivery_check()
    passages = list(chain(*pieces.values()))
    embedded = _embedded(task.app, collection, passages) if passages else None
    rows, left = {passage.id: row for row, passage in enumerate(passages)}, dict(pieces)
    for attempt in range(TRIES):
        put = list(chain(*left.values()))
        if put and embedded is not None:
            vectors = embedded.vectors[[rows[passage.id] for passage in put]]
            store.upsert(collection, put, vectors, embedded.model, check=check)
        stale, mixed = _stored_of(store, collection, left, job_id)
        if stale:
            store.delete(collection, stale, check=check)
            _, mixed = _stored_of(store, collection, left, job_id)
        left = {document_id: pieces[document_id] for document_id in mixed}
        if not left:
            return
        sleep(random.uniform(0, min(2.0, 0.1 * 2**attempt)))
    raise StoreUnavailable(f"collection {collection!r}: others replace the same documents again and again: {[*left]}")


def _stored_of(
    store: VectorStore, collection: str, pieces: Mapping[str, Sequence[Document]], job_id: str
) -> tuple[list[str], list[str]]:
    """Return what is stored beside all that this job has of a document, and documents that are of no one version."""
    passages: dict[str, dict[str, Mapping[str, Any]]] = {document_id: {} for document_id in pieces}
    try:
        for stored_id, metadata in store.scan(collection, where={WHOLE: {"in": list(pieces)}}):
            if (document_id := document_of(stored_id, metadata)) is not None:
                passages[document_id][stored_id] = metadata
        stale = [each for each, metadata in store.scan(collection, pieces) if document_of(each, metadata) is None]
    except CollectionNotFound:
        return [], []
    mixed = []
    for document_id, stored in passages.items():
        ours = {each for each, metadata in stored.items() if metadata.get(ADDED_BY) == job_id}
        if {passage.id for passage in pieces[document_id]} == ours:
            stale += stored.keys() - ours
        versions = {(metadata.get(ADDED_BY), metadata["passages"]) for metadata in stored.values()}
        if (versions and {count for _, count in versions} != {len(stored)}) or len(versions) > 1:
            mixed.append(document_id)
    return stale, mixed


def _passage_ids(app: Celery, collection: str, document_ids: Sequence[str]) -> list[str]:
    """Return the ids of the stored passages of documents. Raises CollectionNotFound."""
    stored = backends_of(app).store.scan(collection, where={WHOLE: {"in": list(document_ids)}})
    return [stored_id for stored_id, metadata in stored if document_of(stored_id, metadata) is not None]


def known_search(
    app: Celery, collection: str, query: str | None = None, vector: list[float] | None = None, k: int = 5,
    where: dict[str, Any] | None = None, mode: Mode | None = None, allow_partial: bool = False, cache: CacheUse = None,
    rerank: Rerank = None, candidates: int | None = None, allow_degraded: bool = True,
) -> dict[str, Any] | None:  # fmt: skip
    """What was found before, in a collection that has not changed since."""
    if cache in (False, "refresh") or (kept := kept_of(app)) is None:
        return None
    reranking = reranking_of(rerank, candidates, k, allow_degraded)
    identity = _identity(query, vector, k, where, mode_of(mode, query), reranking)
    found: dict[str, Any] | None = kept.find_search(collection, identity)
    return _whole(found, allow_partial) if found else None


def search_at_once(
    app: Celery, deadline: float | None, priority: int | None, collection: str, query: str | None = None,
    vector: list[float] | None = None, k: int = 5, where: dict[str, Any] | None = None, mode: Mode | None = None,
    allow_partial: bool = False, cache: CacheUse = None, rerank: Rerank = None, candidates: int | None = None,
    allow_degraded: bool = True,
) -> Signature | None:  # fmt: skip
    """The jobs on the nodes that have the shards, where nothing has to be embedded before; else None."""
    chosen, reranking = mode_of(mode, query), reranking_of(rerank, candidates, k, allow_degraded)
    if (query is not None and chosen != "text") or (shares := shares_of(app, collection, k)) is None:
        return None
    kept = None if cache is False else kept_of(app)
    identity = _identity(query, vector, k, where, chosen, reranking)
    ticket = kept.look_for_search(collection, identity)[1] if kept else None
    asked = asking(collection, k, where, chosen, query, vector, None, reranking)
    return jobs_of(app, shares, asked, deadline, priority, allow_partial=allow_partial, ticket=ticket)


@ready_made(
    "retrieval.search", request_type="retrieval", affinity="collection", prefers=best_node, arguments=SearchArguments,
    known=known_search, instead=search_at_once,
)  # fmt: skip
def search(
    task: ClusterTask,
    collection: str,
    query: str | None = None,
    vector: list[float] | None = None,
    k: int = 5,
    where: dict[str, Any] | None = None,
    mode: Mode | None = None,
    allow_partial: bool = False,
    cache: CacheUse = None,
    rerank: Rerank = None,
    candidates: int | None = None,
    allow_degraded: bool = True,
) -> dict[str, Any]:
    """Find the ``k`` documents that fit a query or a vector best, among those whose metadata match ``where``.

    ``where`` is as ``cluster_tasks.shards.filters`` describes it: ``{"lang": "py", "year": {"gte": 2020}}``.

    ``mode`` is ``"hybrid"`` (for a query, if nothing is said), ``"text"`` or ``"vector"`` (for a vector, always).
    ``"text"`` finds documents that share words with the query, by BM25, and needs no embedding; ``"vector"`` finds what
    means the like, by cosine similarity; ``"hybrid"`` does both and ranks first what is high in both.

    Returns ``collection``, ``cached`` and ``passages``, the best first, each with ``id``, ``text``, ``metadata`` and
    ``score``. What a score is depends on the mode: the cosine similarity, -1 to 1, in ``"vector"``; BM25, above 0 and
    to be compared within one search only, in ``"text"``; in ``"hybrid"`` the mean of what it has of the best of both, 0
    to 1, which says nothing of how well a passage fits: whoever wants a least score asks for ``"vector"``.

    With ``rerank`` so many ``candidates`` are searched for (five for each that is wanted, 25 at least and 1,000 at
    most), and the ``k`` best of them chosen by a reranking model: that of the settings, else ``local-mmr``, if it is
    True; one of another name; ``local-mmr``, which only parts what repeats itself, if it is ``"local"``. Passages then
    have a ``rerank_score``, by which they are ordered, and the result ``rerank``: ``provider``, ``model``, ``degraded``
    and ``degraded_reason``. Where no model is available the order of the search remains, and ``rerank_score`` is None;
    with ``allow_degraded=False`` the job fails as ``llm.generate`` does.

    Fails with CollectionNotFound, and with CollectionMismatch if the collection was made with another embedding model
    or the vector has another dimension.

    With ``cluster_cache_url`` what was found is kept until the collection changes, for ``cluster_cache_search_ttl_s``
    at most, and marked ``cached``. ``cache=False`` neither looks nor keeps, ``"refresh"`` searches anew.

    Where the shards of the collection are assigned to nodes, those that have them in memory are asked, each by one job;
    see ``cluster_tasks.tasks.fanout``. A shard that cannot be read, or was not before the job expired, fails the search
    with StoreUnavailable or SearchIncomplete. With ``allow_partial`` the rest is searched, and ``missing`` lists the
    numbers of such shards.
    """
    chosen, reranking = mode_of(mode, query), reranking_of(rerank, candidates, k, allow_degraded)
    identity = _identity(query, vector, k, where, chosen, reranking)
    kept = None if cache is False else kept_of(task.app)

    def asked() -> Asked:
        if query is None or chosen == "text":
            return asking(collection, k, where, chosen, query, vector, None, reranking)
        made, model = query_vector(task.app, collection, query, cache)
        return asking(collection, k, where, chosen, query, made, model, reranking)

    def here() -> dict[str, Any]:
        return search_here(task.app, asked(), allow_partial=allow_partial)

    if (shares := shares_for(task, collection, k)) is not None:
        found, ticket = kept.look_for_search(collection, identity) if kept else (None, None)
        if found is not None and cache != "refresh":
            return _whole(found, allow_partial)
        return search_nodes(task, shares, asked(), allow_partial=allow_partial, ticket=ticket)
    if kept is None or allow_partial:
        return {**here(), "cached": False}
    found = kept.search(collection, identity, here, cache)
    return {"cached": False, **found}


@ready_made("retrieval.delete_documents", request_type="retrieval", affinity="collection", arguments=DeleteArguments)
def delete_documents(
    task: ClusterTask, collection: str, ids: list[str] | None = None, where: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Delete the documents that have one of ``ids`` and match ``where``, as far as given.

    The id of a document that was split deletes its passages.

    Returns ``deleted``, their number, each passage counted; ids that the collection does not hold are no error. Fails
    with CollectionNotFound, and with StoreUnavailable if others keep adding the same documents: then it is to be
    repeated.
    """
    store = backends_of(task.app).store
    store.ready(collection)
    passages = [] if ids is None else _passage_ids(task.app, collection, ids)
    try:
        wanted = None if ids is None else [*ids, *passages]
        deleted = store.delete(collection, wanted, where, check=task.delivery_check())
        if ids is not None and passages:
            deleted += _delete_rest(task, collection, ids, where)
        return {"deleted": deleted}
    finally:
        _forget_searches(task.app, collection)


def _delete_rest(
    task: ClusterTask, collection: str, document_ids: Sequence[str], where: Mapping[str, Any] | None
) -> int:
    """Delete what is stored of split documents since their passages were read; return how many passages that were.

    Another job may have added one of them anew meanwhile, in more passages: those that nobody knew of would be left.
    """
    store, check, deleted = backends_of(task.app).store, task.delivery_check(), 0
    for _ in range(TRIES):
        passages = _passage_ids(task.app, collection, document_ids)
        more = store.delete(collection, passages, where, check=check) if passages else 0
        # Nothing is left, or nothing that matches.
        if not more:
            return deleted
        deleted += more
    raise StoreUnavailable(f"collection {collection!r}: others add the same documents again and again: {document_ids}")


@ready_made("retrieval.optimize", request_type="retrieval", affinity="collection", arguments=OptimizeArguments)
def optimize(task: ClusterTask, collection: str | None = None) -> dict[str, Any]:
    """Compact a collection, bring its indexes up to date and remove what nobody reads any more.

    Without ``collection`` it sends a job for each that there is. Coordinators send it every ``cluster_optimize_s``.
    Returns ``collections``, those that were worked on or sent for: none while another job is at the same collection, or
    if it was dropped.
    """
    if collection is None:
        try:
            names = backends_of(task.app).store.collections()
        except ConfigurationError as exc:
            # A node without the package that keeps collections has none; whoever asks it for one is told the same.
            logger.info("no collection is looked after here: %s", exc)
            names = []
        for name in names:
            task.apply_async((name,), expires=OPTIMIZE_WITHIN_S)
        return {"collections": names}
    try:
        with cluster_of(task.app).locks.acquire(f"optimize/{collection}", OPTIMIZING_S):
            backends_of(task.app).store.optimize(collection)
    except LockTaken:
        return {"collections": []}
    except LockLost as exc:
        logger.info("a collection took long to optimize: %s", exc)
    except CollectionNotFound:
        return {"collections": []}
    return {"collections": [collection]}


@ready_made("retrieval.get_documents", request_type="retrieval", affinity="collection", arguments=GetArguments)
def get_documents(task: ClusterTask, collection: str, ids: list[str]) -> dict[str, Any]:
    """Return the documents that have one of ``ids``, in the order of these; of a split document, its passages' ids.

    Returns ``collection`` and ``documents``, each with ``id``, ``text`` and ``metadata``. Ids that the collection does
    not hold are no error, and are left out. Fails with CollectionNotFound.
    """
    found = backends_of(task.app).store.get(collection, ids)
    return {"collection": collection, "documents": [document.model_dump(mode="json") for document in found]}


@ready_made("retrieval.list_documents", request_type="retrieval", affinity="collection", arguments=ListArguments)
def list_documents(
    task: ClusterTask, collection: str, where: dict[str, Any] | None = None, after: str = "", limit: int = 1000
) -> dict[str, Any]:
    """List the documents that match ``where``, by id, at most ``limit`` of those whose id comes after ``after``.

    Returns ``collection``, ``documents`` and ``next``: what to give as ``after`` for those that follow, or None. Each
    document has ``id``, ``metadata``, ``passages`` (1, if it was not split) and ``complete``: whether all of these are
    there. Reads the metadata of all that match, 10 to 20 µs a passage. Fails with CollectionNotFound.
    """
    found = wholes(backends_of(task.app).store.scan(collection, where=where), after, limit)
    return {
        "collection": collection,
        "documents": [whole.model_dump(mode="json") for whole in found],
        "next": found[-1].id if len(found) == limit else None,
    }


def _identity(
    query: str | None, vector: list[float] | None, k: int, where: dict[str, Any] | None, mode: Mode,
    reranking: Reranking | None,
) -> list[Any]:  # fmt: skip
    """What decides what a search finds in a collection."""
    return [query, vector, k, where, mode, reranking]


def _forget_searches(app: Celery, collection: str) -> None:
    # After the change, and again when the job is run again after a crash: what was found before it is void.
    if (kept := kept_of(app)) is not None:
        kept.forget_searches(collection)


def mode_of(mode: Mode | None, query: str | None) -> Mode:
    """Return how to search when ``mode`` was asked for: None leaves it to what there is to search with."""
    return mode or ("vector" if query is None else "hybrid")


def _whole(found: dict[str, Any], allow_partial: bool) -> dict[str, Any]:
    return {**found, "missing": []} if allow_partial else found
