"""Collections in Qdrant, which divides, copies and indexes them itself.

A collection ``docs`` is Qdrant's ``PREFIX.docs``, whose own metadata name the embedding model (Qdrant 1.16 or newer
keeps them). A document is a point, whose id is the UUID of version 5 that its own id makes in NAMESPACE: two clients
cannot double it. Its payload has ``id``, ``text`` and ``metadata``; its vectors are ``vector``, of length 1 so that
their dot product is the cosine similarity, and ``words`` (see ``words``), if it has any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar
from uuid import UUID, uuid5

from numpy.typing import NDArray
from qdrant_client import QdrantClient, models
from qdrant_client.http.exceptions import UnexpectedResponse

from cluster_tasks.addresses.qdrant import QdrantUrl
from cluster_tasks.errors import CollectionNotFound, ConfigurationError, InvalidArguments, did_you_mean
from cluster_tasks.shards.documents import Document, Mode, Passage
from cluster_tasks.shards.filters import Where, conditions_of
from cluster_tasks.shards.fusion import depth, in_order, is_settled, rank
from cluster_tasks.shards.ingest.splitting import WHOLE
from cluster_tasks.shards.layout import COLLECTION, check_collection, check_fit
from cluster_tasks.shards.qdrant.connection import Connection
from cluster_tasks.shards.qdrant.filters import METADATA, field, filter_of, read_metadata, stored_metadata
from cluster_tasks.shards.qdrant.words import document_vector, query_vector
from cluster_tasks.shards.query import Query
from cluster_tasks.shards.vector_store import Check
from cluster_tasks.shards.vectors import Vectors, similarity, unit_rows

NAMESPACE = UUID("8a5b1f0e-6d2c-5a57-9c1e-2f6f0d7c3b91")
"""Never to be changed: by it a document is found again."""
VECTOR, WORDS = "vector", "words"
WRITTEN_AT_ONCE = 64
"""Points of one request, which Qdrant refuses above 32 MB: vectors of 4,096 numbers take 6, the texts of a job 16."""
READ_AT_ONCE = 1_000
MODEL = "embedding_model"

T = TypeVar("T")


class QdrantStore:
    """A ``VectorStore`` in a Qdrant. Making one does no I/O.

    Any operation raises ConfigurationError if Qdrant refuses the key, or if another process has the folder of a Qdrant
    without a server.
    """

    def __init__(self, address: QdrantUrl) -> None:
        self._connection = Connection(address)
        self._indexed: set[str] = set()
        """The collections whose passages are indexed by their documents."""

    def collections(self) -> list[str]:
        """Return the names of all collections, sorted."""
        found = self._connection.ask("collections", lambda client: client.get_collections()).collections
        prefix = self._connection.named("")
        ours = (each.name.removeprefix(prefix) for each in found if each.name.startswith(prefix))
        return sorted(filter(COLLECTION.fullmatch, ours))

    def ready(self, collection: str) -> None:
        """Nothing: Qdrant takes writes at any time."""

    def upsert(
        self, collection: str, documents: Sequence[Document], vectors: Vectors, embedding_model: str, *,
        check: Check | None = None,
    ) -> int:  # fmt: skip
        """See ``VectorStore.upsert``. Some 64 documents at a time are there as soon as they are written."""
        check_collection(collection)
        if not documents:
            return 0
        units = unit_rows(vectors, rows=len(documents))
        check_fit(collection, self._made(collection, embedding_model, units.shape[1]), units.shape[1], embedding_model)
        last = list({document.id: row for row, document in enumerate(documents)}.values())
        for start in range(0, len(last), WRITTEN_AT_ONCE):
            rows = last[start : start + WRITTEN_AT_ONCE]
            if check is not None:
                check()
            self._ask(collection, partial(_write, [_point(documents[row], units[row]) for row in rows]))
        return len(last)

    def delete(
        self, collection: str, ids: Iterable[str] | None = None, where: Where | None = None, *,
        check: Check | None = None,
    ) -> int:  # fmt: skip
        """See ``VectorStore.delete``. Qdrant does not say how many it deletes: they are counted just before."""
        if ids is None and not where:
            raise InvalidArguments("delete needs ids or a filter; drop() removes a whole collection")
        chosen = _chosen(ids, where)
        assert chosen is not None

        def delete(client: QdrantClient, name: str) -> int:
            found = client.count(name, count_filter=chosen, exact=True).count
            if found:
                if check is not None:
                    check()
                client.delete(name, models.FilterSelector(filter=chosen), wait=True)
            return found

        return self._ask(collection, delete)

    def search(
        self, collection: str, vector: Vectors | None = None, k: int = 5, where: Where | None = None,
        embedding_model: str | None = None, *, text: str | None = None, mode: Mode | None = None,
    ) -> list[Passage]:  # fmt: skip
        """See ``VectorStore.search``. In a large collection Qdrant's index finds nearly always all of the nearest."""
        query = Query.of(vector, text, k, where, mode)
        searches = _searches(query)
        held = self._held(collection)
        if query.mode != "text":
            check_fit(collection, held, len(query.vector), embedding_model)
        found = self._ask(collection, partial(_rankings, searches, depth(query.mode, k)))
        ranked = rank(query.mode, [found.get(VECTOR, [])], [found.get(WORDS, [])], k)
        return [passage.model_copy(update={"score": score}) for score, passage in ranked]

    def check_fit(self, collection: str, dimensions: int, embedding_model: str) -> None:
        """See ``VectorStore.check_fit``."""
        check_fit(collection, self._held(collection), dimensions, embedding_model)

    def scan(
        self, collection: str, ids: Iterable[str] | None = None, where: Where | None = None
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """See ``VectorStore.scan``. Reads as many as are asked for at a time: what is written meanwhile may be seen."""
        chosen = _chosen(ids, where)
        points, following = self._ask(collection, partial(_page, chosen, None))
        while True:
            for point in points:
                payload = _payload(point)
                yield payload["id"], read_metadata(payload[METADATA])
            if following is None:
                return
            points, following = self._ask(collection, partial(_page, chosen, following))

    def get(self, collection: str, ids: Iterable[str]) -> list[Document]:
        """See ``VectorStore.get``."""
        wanted = list(dict.fromkeys(ids))
        points = self._ask(collection, partial(_points, [_point_id(document_id) for document_id in wanted]))
        found = {document.id: document for document in map(_document, points)}
        return [found[document_id] for document_id in wanted if document_id in found]

    def count(self, collection: str) -> int:
        """See ``VectorStore.count``."""
        return self._ask(collection, lambda client, name: client.count(name, exact=True).count)

    def drop(self, collection: str) -> None:
        """See ``VectorStore.drop``."""
        self._indexed.discard(collection)
        if not self._ask(collection, lambda client, name: client.delete_collection(name)):
            raise self._not_found(collection)

    def optimize(self, collection: str) -> bool:
        """Nothing: Qdrant does that itself. Raises CollectionNotFound."""
        self._held(collection)
        return True

    def close(self) -> None:
        """Close the connections of this process, and give up the folder of a Qdrant without a server."""
        self._connection.close()

    def _ask(self, collection: str, request: Callable[[QdrantClient, str], T]) -> T:
        name = self._connection.named(check_collection(collection))
        try:
            return self._connection.ask(collection, lambda client: request(client, name))
        except CollectionNotFound as exc:
            raise self._not_found(collection) from exc

    def _not_found(self, collection: str) -> CollectionNotFound:
        others = (name for name in self.collections() if name != collection)
        return CollectionNotFound(f"no collection {collection!r}{did_you_mean(collection, others)}")

    def _held(self, collection: str) -> tuple[str, int]:
        """Return the embedding model and the dimensions of a collection."""
        config = self._ask(collection, lambda client, name: client.get_collection(name)).config
        metadata = config.metadata or {}
        if MODEL not in metadata:
            raise ConfigurationError(
                f"{self._connection.address}: {self._connection.named(collection)} does not name its embedding model: "
                "somebody else made it, or Qdrant is older than 1.16"
            )
        vectors = config.params.vectors
        assert isinstance(vectors, Mapping)
        return metadata[MODEL], vectors[VECTOR].size

    def _made(self, collection: str, embedding_model: str, dimensions: int) -> tuple[str, int]:
        """Make a collection unless it exists; return what it holds. Of several makers at once one wins."""
        try:
            held = self._held(collection)
        except CollectionNotFound:
            self._ask(collection, lambda client, name: self._make(client, name, embedding_model, dimensions))
            held = self._held(collection)
        if collection not in self._indexed:
            self._ask(collection, self._index)
            self._indexed.add(collection)
        return held

    def _make(self, client: QdrantClient, name: str, embedding_model: str, dimensions: int) -> None:
        if client.collection_exists(name):
            return
        try:
            client.create_collection(
                name,
                vectors_config={VECTOR: models.VectorParams(size=dimensions, distance=models.Distance.DOT)},
                sparse_vectors_config={WORDS: models.SparseVectorParams(modifier=models.Modifier.IDF)},
                metadata={MODEL: embedding_model},
            )
        except UnexpectedResponse as exc:
            # Another was quicker.
            if exc.status_code != 409:
                raise

    def _index(self, client: QdrantClient, name: str) -> None:
        # Whoever made the collection may have died before it had this index, which is made once however often asked
        # for: by it the passages of a document are found whenever that is added again.
        if not self._connection.address.folder:
            client.create_payload_index(name, field(WHOLE, ""), models.PayloadSchemaType.KEYWORD, wait=True)


def _write(points: list[models.PointStruct], client: QdrantClient, name: str) -> None:
    client.upsert(name, points, wait=True)


def _page(
    chosen: models.Filter | None, offset: Any, client: QdrantClient, name: str
) -> tuple[list[models.Record], Any]:  # fmt: skip
    return client.scroll(name, chosen, limit=READ_AT_ONCE, offset=offset, with_payload=["id", METADATA])


def _points(point_ids: Sequence[str], client: QdrantClient, name: str) -> list[models.Record]:
    return client.retrieve(name, point_ids, with_payload=True)


def _document(point: models.Record) -> Document:
    payload = _payload(point)
    # It was checked when it was stored.
    return Document.model_construct(id=payload["id"], text=payload["text"], metadata=read_metadata(payload[METADATA]))


def _point(document: Document, unit: NDArray[Any]) -> models.PointStruct:
    vectors: dict[str, Any] = {VECTOR: unit.tolist()}
    if words := document_vector(document.text):
        vectors[WORDS] = _sparse(words)
    payload = {"id": document.id, "text": document.text, METADATA: stored_metadata(document.metadata)}
    return models.PointStruct(id=_point_id(document.id), vector=vectors, payload=payload)


def _point_id(document_id: str) -> str:
    return str(uuid5(NAMESPACE, document_id))


def _sparse(vector: Mapping[int, float]) -> models.SparseVector:
    return models.SparseVector(indices=list(vector), values=list(vector.values()))


def _chosen(ids: Iterable[str] | None, where: Where | None) -> models.Filter | None:
    return filter_of(conditions_of(where or {}), None if ids is None else map(_point_id, ids))


def _searches(query: Query) -> dict[str, models.QueryRequest]:
    """Return what to ask, by the name of the vector that is compared; nothing for a text without words."""
    chosen, compared = filter_of(query.conditions), dict[str, Any]()
    if query.mode != "text":
        compared[VECTOR] = models.NearestQuery(nearest=query.vector.tolist())
    if query.mode != "vector" and (words := query_vector(query.text)):
        compared[WORDS] = models.NearestQuery(nearest=_sparse(words))
    return {
        name: models.QueryRequest(query=wanted, using=name, filter=chosen, with_payload=True)
        for name, wanted in compared.items()
    }


def _rankings(
    searches: Mapping[str, models.QueryRequest], k: int, client: QdrantClient, name: str
) -> dict[str, list[Passage]]:
    """Return the ``k`` best of each search, of equals the least ids."""
    limit = k + 1
    while searches:
        requests = [search.model_copy(update={"limit": limit}) for search in searches.values()]
        answers = client.query_batch_points(name, requests)
        found = {
            by: in_order(_passage(point, by) for point in answer.points)
            for by, answer in zip(searches, answers, strict=True)
        }
        if all(is_settled(passages, limit, k) for passages in found.values()):
            return {by: passages[:k] for by, passages in found.items()}
        limit *= 8
    return {}


def _passage(point: models.ScoredPoint, by: str) -> Passage:
    payload = _payload(point)
    score = similarity(point.score) if by == VECTOR else point.score
    return Passage(id=payload["id"], text=payload["text"], metadata=read_metadata(payload[METADATA]), score=score)


def _payload(point: models.ScoredPoint | models.Record) -> dict[str, Any]:
    assert point.payload is not None
    return point.payload
