"""A search in a collection whose shards lie on several nodes: one job on each, and one that merges what they found.

None waits for another. A chord stands for the job that was asked: ``retrieval.search_shards`` for every node, then
``retrieval.merge``. The caller sends it, or the job is replaced by it when it has embedded the query. An error of the
store is a part's result and not its failure, so the merge hears of all parts and raises the error itself. A job of a
node that is lost goes to another, which finds the same, for the data are shared; and that of a node which is late is
given to a second one as well: see ``cluster_tasks.broker.hedging``.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

import redis
from celery import Celery, chord
from celery.canvas import Signature

from cluster_tasks import errors
from cluster_tasks.broker.hedging import HEDGE_PROPERTY, Hedge
from cluster_tasks.errors import (
    CollectionMismatch,
    CollectionNotFound,
    InvalidArguments,
    LayoutChanged,
    SearchIncomplete,
    StoreUnavailable,
)
from cluster_tasks.shards.documents import Mode
from cluster_tasks.shards.shard_map import ANY_NODE, Shares
from cluster_tasks.tasks.apps import cluster_of
from cluster_tasks.tasks.base import ClusterTask, expiry
from cluster_tasks.tasks.kept import Ticket, kept_of
from cluster_tasks.tasks.ready_made import backends_of, ready_made
from cluster_tasks.tasks.reranking import Reranking, is_degraded, reranked

if TYPE_CHECKING:
    from cluster_tasks.shards.documents import Candidates

logger = logging.getLogger(__name__)

SEARCH_SHARDS, MERGE = "retrieval.search_shards", "retrieval.merge"
WIDE = 1_000
"""A search for more passages is one job: to send them all to a merge would take longer than to find them."""
ROOM = 256 * 1024
"""More goes over the wire twice, and takes longer than to read the texts of those that are chosen."""
TOLD = (CollectionMismatch, CollectionNotFound, InvalidArguments, LayoutChanged, StoreUnavailable)
"""Errors of a part that its merge is told of."""
PASSING = (StoreUnavailable.__name__, SearchIncomplete.__name__)
"""Those that others of the collection's shards do not share."""


class Asked(TypedDict):
    """What is searched for."""

    collection: str
    k: int
    where: dict[str, Any] | None
    mode: Mode
    text: str | None
    vector: list[float] | None
    model: str | None
    """That made the vector; None: nobody says."""
    rerank: NotRequired[Reranking]
    """How what is found is ranked anew."""
    room: NotRequired[int]
    """How many bytes of passages a node may send to the merge; if it finds more, it sends their ids and scores."""


class Part(TypedDict):
    """What one node says of its shards."""

    job: str
    found: list[dict[str, Any]]
    """As ``Candidates``."""
    missing: list[int]
    error: tuple[str, str] | None
    """Name and words of the first error."""


def asking(
    collection: str, k: int, where: dict[str, Any] | None, mode: Mode, text: str | None, vector: Any,
    model: str | None, rerank: Reranking | None = None,
) -> Asked:  # fmt: skip
    """Return what is searched for; ``vector`` is an array, a list or None."""
    listed = None if vector is None else [float(number) for number in vector]
    asked = Asked(collection=collection, k=k, where=where, mode=mode, text=text, vector=listed, model=model)
    return {**asked, "rerank": rerank} if rerank else asked


def best_node(app: Celery, collection: str, **_: Any) -> str | None:
    """The node that has all shards of a collection in memory; None: there is none, or all are as good."""
    shares = _assigned(app, collection)
    return next(iter(shares.of_nodes)) if shares is not None and len(shares.of_nodes) == 1 else None


def shares_of(app: Celery, collection: str, k: int) -> Shares | None:
    """Say which nodes are to search a collection; None: one job is, anywhere."""
    shares = _assigned(app, collection) if k <= WIDE else None
    return shares if shares is not None and len(shares.of_nodes) > 1 else None


def _assigned(app: Celery, collection: str) -> Shares | None:
    cluster = cluster_of(app)
    # An outside engine is asked by one job; what was assigned before is no more.
    return None if cluster.settings.vector_url else cluster.shard_map.shares(collection)


def shares_for(task: ClusterTask, collection: str, k: int) -> Shares | None:
    """Say which nodes are to search a collection for a job; None: the job itself."""
    # A job that is run here and now cannot be replaced.
    is_here = task.request.is_eager or task.request.called_directly
    return None if is_here else shares_of(task.app, collection, k)


def search_nodes(
    task: ClusterTask, shares: Shares, asked: Asked, *, allow_partial: bool = False, ticket: Ticket | None = None,
    deadline: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Let the nodes search, and one of them answer in the place of ``task``. Does not return: see ``Task.replace``.

    Until ``deadline`` in seconds since 1970; None: until ``task`` expires.
    """
    if deadline is None:
        deadline = expiry(task.request.expires)
    priority = (task.request.delivery_info or {}).get("priority")
    jobs = jobs_of(task.app, shares, asked, deadline, priority, allow_partial=allow_partial, ticket=ticket)
    replaced: dict[str, Any] = task.replace(jobs)
    return replaced


def jobs_of(
    app: Celery, shares: Shares, asked: Asked, deadline: float | None, priority: int | None, *,
    allow_partial: bool = False, ticket: Ticket | None = None,
) -> Signature:  # fmt: skip
    """Return the jobs of a search over nodes, until ``deadline`` in seconds since 1970."""
    part, options = app.tasks[SEARCH_SHARDS], {} if priority is None else {"priority": priority}
    limit = cluster_of(app).settings.max_message_bytes
    # All parts together, and what JSON and Base64 add, are to fit into the message of the merge.
    asked = {**asked, "room": min(ROOM, limit // (3 * len(shares.of_nodes))) if limit else ROOM}
    hedges = _hedges(app, shares, asked["collection"], deadline)
    header = [
        part.s(asked, shares.generation, list(numbers), node_id, deadline, allow_partial).set(
            **options, **hedges.get(node_id, {})
        )
        for node_id, numbers in shares.of_nodes.items()
    ]
    return chord(header, app.tasks[MERGE].s(asked, allow_partial, ticket).set(**options))


def _hedges(app: Celery, shares: Shares, collection: str, deadline: float | None) -> dict[str, dict[str, Hedge]]:
    """Return by node the options that let a second one search its shards when it is late."""
    after_s = shares.late_after_s
    if not cluster_of(app).settings.search_hedge or (deadline is not None and time.time() + after_s > deadline):
        return {}
    return {node_id: {HEDGE_PROPERTY: Hedge(second, after_s, collection)} for node_id, second in shares.seconds.items()}


def search_here(app: Celery, asked: Asked, *, allow_partial: bool = False) -> dict[str, Any]:
    """Search all of a collection in this process. Raises as ``VectorStore.search`` and ``reranked`` do."""
    return _reranked(app, asked, _found_here(app, asked, allow_partial=allow_partial))


def _found_here(app: Celery, asked: Asked, *, allow_partial: bool) -> dict[str, Any]:
    backends = backends_of(app)
    try:
        found = backends.store.search(*_query(asked), text=asked["text"], mode=asked["mode"])
    except StoreUnavailable:
        # Of an outside engine no part is known.
        if not allow_partial or cluster_of(app).settings.vector_url:
            raise
        layout = backends.sharded.layout(asked["collection"])
        candidates, failed = _one_by_one(app, asked, layout.generation, range(layout.shards))
        return {**_combined(app, asked, candidates), "missing": list(failed)}
    result = {"collection": asked["collection"], "passages": [passage.model_dump(mode="json") for passage in found]}
    return {**result, "missing": []} if allow_partial else result


def _named(app: Celery, node_id: str = ANY_NODE, **_: Any) -> str:
    return node_id


# Its chord is told of its result, and nobody else is to be.
@ready_made(SEARCH_SHARDS, request_type="retrieval", prefers=_named, ignore_result=True)
def search_shards(
    task: ClusterTask,
    asked: Asked,
    generation: int,
    shards: list[int],
    node_id: str = ANY_NODE,
    deadline: float | None = None,
    allow_partial: bool = False,
) -> Part:
    """Search some shards of a generation of a collection, until ``deadline`` in seconds since 1970."""
    if deadline is not None and time.time() > deadline:
        late = SearchIncomplete(f"shards {shards} of {asked['collection']!r} were not searched in time")
        return _part(task, failed=dict.fromkeys(shards, late))
    try:
        return _part(task, *_candidates(task.app, asked, generation, shards, allow_partial), room=asked.get("room"))
    except TOLD as exc:
        return _part(task, failed=dict.fromkeys(shards, exc))


@ready_made(MERGE, request_type="retrieval")
def merge(
    task: ClusterTask, parts: Sequence[Part], asked: Asked, allow_partial: bool = False, ticket: Ticket | None = None
) -> dict[str, Any]:
    """Put together what ``retrieval.search_shards`` found on each node; fail with the first error if one failed.

    With ``allow_partial`` the shards that could not be searched are named. If the collection was divided anew
    meanwhile, all of it is searched here. What is to be ranked anew is, here as well.
    """
    failed = [part["error"] for part in parts if part["error"]]
    names = {name for name, _ in failed}
    if LayoutChanged.__name__ in names:
        result = search_here(task.app, asked, allow_partial=allow_partial)
    elif failed and not (allow_partial and names <= set(PASSING)):
        raise _error_of(*min(failed, key=lambda error: error[0] in PASSING))
    else:
        result = _reranked(task.app, asked, _combined(task.app, asked, _read(parts)))
        if allow_partial:
            result["missing"] = sorted(number for part in parts for number in part["missing"])
    kept = kept_of(task.app)
    if kept is not None and ticket is not None and not result.get("missing") and not is_degraded(result):
        lasting = {key: value for key, value in result.items() if key != "missing"}
        kept.keep_search(asked["collection"], ticket, lasting)
    _forget(task.app, [part["job"] for part in parts])
    return {**result, "cached": False}


def _query(asked: Asked) -> tuple[Any, ...]:
    import numpy as np

    vector = None if asked["vector"] is None else np.asarray(asked["vector"])
    return asked["collection"], vector, _wanted(asked), asked["where"], asked["model"]


def _wanted(asked: Asked) -> int:
    """How many passages are to be found."""
    return asked["rerank"]["candidates"] if "rerank" in asked else asked["k"]


def _candidates(
    app: Celery, asked: Asked, generation: int, shards: Sequence[int], allow_partial: bool
) -> tuple[list[Candidates], dict[int, StoreUnavailable]]:
    """Return what is found in shards, and with ``allow_partial`` why some could not be read."""
    try:
        return [_search(app, asked, generation, shards)], {}
    except StoreUnavailable:
        if not allow_partial:
            raise
    return _one_by_one(app, asked, generation, shards)


def _one_by_one(
    app: Celery, asked: Asked, generation: int, shards: Iterable[int]
) -> tuple[list[Candidates], dict[int, StoreUnavailable]]:
    found: list[Candidates] = []
    failed: dict[int, StoreUnavailable] = {}
    for number in shards:
        try:
            found.append(_search(app, asked, generation, [number]))
        except StoreUnavailable as exc:
            failed[number] = exc
    return found, failed


def _search(app: Celery, asked: Asked, generation: int, shards: Sequence[int]) -> Candidates:
    if cluster_of(app).settings.vector_url:
        raise LayoutChanged(f"collection {asked['collection']!r} has no shards here any more")
    return backends_of(app).sharded.candidates(
        *_query(asked), text=asked["text"], mode=asked["mode"], shards=shards, generation=generation
    )


def _combined(app: Celery, asked: Asked, found: Sequence[Candidates]) -> dict[str, Any]:
    from cluster_tasks.shards.fusion import combine

    passages = combine(asked["mode"], found, _wanted(asked))
    # No document is without text.
    if bare := [passage.id for passage in passages if not passage.text]:
        stored = {each.id: each for each in backends_of(app).sharded.get(asked["collection"], bare)}
        # What was deleted meanwhile is not found any more.
        kept = [passage for passage in passages if passage.text or passage.id in stored]
        passages = [
            passage.model_copy(update=stored[passage.id].model_dump(include={"text", "metadata"}))
            if not passage.text else passage
            for passage in kept
        ]  # fmt: skip
    return {"collection": asked["collection"], "passages": [passage.model_dump(mode="json") for passage in passages]}


def _reranked(app: Celery, asked: Asked, found: dict[str, Any]) -> dict[str, Any]:
    return reranked(app, found, asked["text"], asked["k"], asked.get("rerank"))


def _part(
    task: ClusterTask, found: Sequence[Candidates] = (), failed: Mapping[int, Exception] = MappingProxyType({}),
    room: int | None = None,
) -> Part:  # fmt: skip
    first = next(iter(failed.values()), None)
    told = [each.model_dump(mode="json") for each in found]
    if room is not None and len(json.dumps(told)) > room:
        for passage in chain.from_iterable([*each["nearest"], *each["matching"]] for each in told):
            passage.update(text="", metadata={})
    return Part(
        job=task.request.id, found=told, missing=list(failed),
        error=None if first is None else (type(first).__name__, str(first)),
    )  # fmt: skip


def _read(parts: Sequence[Part]) -> list[Candidates]:
    from cluster_tasks.shards.documents import Candidates

    return [Candidates.model_validate(found) for part in parts for found in part["found"]]


def _error_of(name: str, words: str) -> Exception:
    error: Exception = getattr(errors, name)(words)
    return error


def _forget(app: Celery, jobs: Sequence[str]) -> None:
    """Let Redis forget the results of parts: nobody else needs them, and each holds passages."""
    try:
        for job in jobs:
            app.backend.delete(app.backend.get_key_for_task(job))
    except (AttributeError, redis.RedisError) as exc:
        logger.debug("parts of a search are kept for as long as any result: %r", exc)
