"""What the jobs need of whatever keeps the collections: the seam between them and an engine.

An engine of our own, ``store.CollectionStore``, has shards besides, which are placed on nodes. Another one divides and
copies its collections itself, and is asked by one job.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from cluster_tasks.shards.documents import Document, Mode, Passage
from cluster_tasks.shards.filters import Where

if TYPE_CHECKING:
    from cluster_tasks.shards.vectors import Vectors


Check = Callable[[], None]
"""Raises an error if a write must not be any more."""


class VectorStore(Protocol):
    """Collections of documents. Threads may share one, and it may be made before a fork.

    Any operation may raise StoreUnavailable, all but ``upsert`` CollectionNotFound, and those that filter
    InvalidArguments. A write that fails midway has changed some documents and not others, and is to be repeated.
    """

    def collections(self) -> list[str]:
        """Return the names of all collections, sorted."""

    def ready(self, collection: str) -> None:
        """Raise BeingSplit if a collection cannot be written to for now; nothing, if there is none of that name."""

    def upsert(
        self, collection: str, documents: Sequence[Document], vectors: Vectors, embedding_model: str, *,
        check: Check | None = None,
    ) -> int:  # fmt: skip
        """Insert documents, or replace those of the same id; return how many.

        ``vectors`` has the shape (documents, dimensions). Of documents with one id the last wins. The first upsert
        makes the collection. Raises CollectionMismatch for another embedding model or dimension. Before each write
        ``check`` is called, under the lock of the shard, if there is one; what it raises ends all.
        """

    def delete(
        self, collection: str, ids: Iterable[str] | None = None, where: Where | None = None, *,
        check: Check | None = None,
    ) -> int:  # fmt: skip
        """Delete the documents that have one of ``ids`` and match ``where``, as far as given; return how many."""

    def search(
        self, collection: str, vector: Vectors | None = None, k: int = 5, where: Where | None = None,
        embedding_model: str | None = None, *, text: str | None = None, mode: Mode | None = None,
    ) -> list[Passage]:  # fmt: skip
        """Return the ``k`` best documents among those that match, best first, equals by id.

        By the nearness of their vectors to ``vector``, whose shape is (dimensions,), by the words that they share with
        ``text``, or by both: ``mode``, None: by what is given. See ``Passage.score``. Raises CollectionMismatch if the
        vector's dimension, or its ``embedding_model`` if named, is not the collection's.
        """

    def check_fit(self, collection: str, dimensions: int, embedding_model: str) -> None:
        """Raise CollectionMismatch for vectors of another dimension or model than the collection's."""

    def scan(
        self, collection: str, ids: Iterable[str] | None = None, where: Where | None = None
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield id and metadata of the documents that have one of ``ids`` and match ``where``, as far as given.

        They come in no order. Whether a document is among them that is written meanwhile is not said.
        """

    def get(self, collection: str, ids: Iterable[str]) -> list[Document]:
        """Return the documents of ``ids`` that the collection holds, in the order of these, each once."""

    def count(self, collection: str) -> int:
        """Return how many documents the collection holds."""

    def drop(self, collection: str) -> None:
        """Remove the collection and its documents. Safe to repeat if it fails."""

    def optimize(self, collection: str) -> bool:
        """Do what keeps searches quick. Returns False if a writer came in between, which is harmless."""
