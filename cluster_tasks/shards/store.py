"""Collections of documents in shards, below a folder or URL that all nodes reach."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from cluster_tasks.errors import CollectionNotFound, InvalidArguments
from cluster_tasks.locks import Locks
from cluster_tasks.shards import searching, tables
from cluster_tasks.shards.catalogue import Catalogue
from cluster_tasks.shards.database import KEPT_VERSIONS, Database, unavailable
from cluster_tasks.shards.documents import Candidates, Document, Mode, Passage
from cluster_tasks.shards.filters import Where, any_of, compile_where, quote
from cluster_tasks.shards.indexes import optimize
from cluster_tasks.shards.layout import Layout, check_collection, check_shards
from cluster_tasks.shards.layouts import SILENCE_S, WRITERS_WAIT_S, Layouts
from cluster_tasks.shards.making import clean, drop, make
from cluster_tasks.shards.query import Query
from cluster_tasks.shards.resharding import Resharding
from cluster_tasks.shards.vector_store import Check
from cluster_tasks.shards.vectors import Vectors, unit_rows
from cluster_tasks.shards.writers import Writers

if TYPE_CHECKING:
    from lancedb.table import AsyncTable, Table

Shards = Sequence[int] | None
T = TypeVar("T")


class CollectionStore:
    """The collections below ``data_dir``. Threads may share one. It may be made before a fork, but not used:
    a child of a process that used it is refused with StoreUnavailable.

    Every operation opens its tables anew, in about a millisecond each, so it sees all that was committed before it
    began. A write is one commit in each shard: one that fails midway has changed some shards and not others, and is to
    be repeated; what it has done already is not done twice.

    ``shards`` confines an operation to some shards, from 0: for nodes that have shards each. Their numbers mean
    something within a ``generation`` of a collection only: whoever names it is refused with LayoutChanged in another.

    Any operation may raise StoreUnavailable, and all but ``upsert`` CollectionNotFound. Making a store raises
    ConfigurationError if LanceDB is not installed.
    """

    def __init__(
        self, data_dir: str, shards: int = 1, locks: Locks | None = None, *, split_silence_s: float = SILENCE_S,
        writers_wait_s: float = WRITERS_WAIT_S,
    ) -> None:  # fmt: skip
        """Collections that are made have so many ``shards``, unless ``upsert`` is told another number.

        With ``locks`` each shard has one writer at a time: ``writers`` says what that excludes, and what raises. A
        split that is silent for ``split_silence_s`` is taken for dead. While there is one, what writes waits, and fails
        with BeingSplit after ``writers_wait_s``.
        """
        self._shards = check_shards(shards)
        self._database = Database(data_dir)
        self._catalogue = Catalogue(self._database)
        self._layouts = Layouts(self._database, self._catalogue, split_silence_s, writers_wait_s)
        self._resharding = Resharding(self._database, self._catalogue, self._layouts, split_silence_s)
        self._writers = Writers(self._database, locks)

    def collections(self) -> list[str]:
        """Return the names of all collections, sorted."""
        return self._catalogue.live()

    def layout(self, collection: str) -> Layout:
        """Return how a collection is divided."""
        return self._layouts.live(collection)

    def ready(self, collection: str) -> None:
        """Wait as long as writers do while a collection is split. Raises BeingSplit."""
        with suppress(CollectionNotFound):
            self._layouts.settled(collection)

    def upsert(
        self, collection: str, documents: Sequence[Document], vectors: Vectors, embedding_model: str, *,
        new_shards: int | None = None, shards: Shards = None, generation: int | None = None, check: Check | None = None,
    ) -> int:  # fmt: skip
        """Insert documents, or replace those of the same id; return how many, without those outside ``shards``.

        ``vectors`` has the shape (documents, dimensions). Of documents with one id the last wins. The first upsert
        makes the collection, of ``new_shards``. Raises CollectionMismatch for another embedding model or dimension.
        ``check`` is called before each commit, under the shard's lock; what it raises ends all.
        """
        check_collection(collection)
        if not documents:
            return 0
        units = unit_rows(vectors, rows=len(documents))
        last = {document.id: row for row, document in enumerate(documents)}
        number = self._shards if new_shards is None else check_shards(new_shards)
        make(self._database, self._catalogue, collection, number, embedding_model, units.shape[1])

        def write(layout: Layout) -> int:
            layout.check_fit(units.shape[1], embedding_model)

            def put(part: tuple[int, list[int]]) -> int:
                shard, numbers = part
                name, some = layout.table(shard), [documents[number] for number in numbers]

                def merge(table: Table, token: int | None) -> int:
                    rows = tables.rows(some, units[numbers], embedding_model, token or tables.UNLOCKED)
                    return tables.merge(table, rows, token)

                version = self._writers.commit(name, merge, check)
                self._database.compact_if_due(name, version, sum(len(document.text) for document in some), optimize)
                return len(numbers)

            return sum(self._database.map(put, layout.divide(last, shards).items()))

        return self._layouts.write(collection, generation, write)

    def delete(
        self, collection: str, ids: Iterable[str] | None = None, where: Where | None = None, *,
        shards: Shards = None, generation: int | None = None, check: Check | None = None,
    ) -> int:  # fmt: skip
        """Delete the documents that have one of ``ids`` and match ``where``, as far as given; return how many.

        ``check`` is as of ``upsert``.
        """
        if ids is None and not where:
            raise InvalidArguments("delete needs ids or a filter; drop() removes a whole collection")
        wanted = None if ids is None else {document_id: quote(document_id) for document_id in ids}
        matching = [compile_where(where)] if where else []

        def write(layout: Layout) -> int:
            conditions = _conditions(layout, shards, wanted, matching)

            def remove(part: tuple[int, str]) -> int:
                shard, condition = part
                name = layout.table(shard)
                deleted, version = self._writers.commit(
                    name, lambda table, token: tables.delete(table, condition, token), check
                )
                self._database.compact_if_due(name, version, compact=optimize)
                return deleted

            return sum(self._database.map(remove, conditions.items()))

        return self._layouts.write(collection, generation, write)

    def search(
        self, collection: str, vector: Vectors | None = None, k: int = 5, where: Where | None = None,
        embedding_model: str | None = None, *, text: str | None = None, mode: Mode | None = None,
        shards: Shards = None, generation: int | None = None,
    ) -> list[Passage]:  # fmt: skip
        """Return the ``k`` best documents among those that match, best first, equals by id.

        By the nearness of their vectors to ``vector``, whose shape is (dimensions,), by the words that they share with
        ``text``, or by both: ``mode``, None: by what is given. See ``Passage.score``. Raises CollectionMismatch if the
        vector's dimension, or its ``embedding_model`` if named, is not the collection's.
        """
        query = Query.of(vector, text, k, where, mode)
        return self._ask(collection, query, embedding_model, shards, generation, searching.best)

    def candidates(
        self, collection: str, vector: Vectors | None = None, k: int = 5, where: Where | None = None,
        embedding_model: str | None = None, *, text: str | None = None, mode: Mode | None = None,
        shards: Shards = None, generation: int | None = None,
    ) -> Candidates:  # fmt: skip
        """Return what ``fusion.combine`` makes the ``k`` best of, when it has that of all shards. As ``search``."""
        query = Query.of(vector, text, k, where, mode)
        return self._ask(collection, query, embedding_model, shards, generation, searching.candidates)

    def check_fit(self, collection: str, dimensions: int, embedding_model: str) -> None:
        """Raise CollectionMismatch for vectors of another dimension or model than the collection's."""
        self._layouts.live(collection).check_fit(dimensions, embedding_model)

    def scan(
        self, collection: str, ids: Iterable[str] | None = None, where: Where | None = None, *,
        shards: Shards = None, generation: int | None = None,
    ) -> Iterator[tuple[str, dict[str, Any]]]:  # fmt: skip
        """Yield id and metadata of the documents that have one of ``ids`` and match ``where``, as far as given.

        They come in no order, and as they were when this began.
        """
        wanted = None if ids is None else {document_id: quote(document_id) for document_id in ids}
        matching = [compile_where(where)] if where else []
        conditions: list[str] = []

        def chosen(layout: Layout) -> Sequence[int]:
            by_shard = _conditions(layout, shards, wanted, matching)
            conditions[:] = by_shard.values()
            return list(by_shard)

        opened = self._read(collection, generation, chosen, searching.opened)
        with unavailable(collection):
            for table, condition in zip(opened, conditions, strict=True):
                batches = tables.scan(table, condition)
                while batch := self._database.run(partial(searching.following, batches)):
                    yield from batch

    def get(
        self, collection: str, ids: Iterable[str], *, shards: Shards = None, generation: int | None = None
    ) -> list[Document]:  # fmt: skip
        """Return the documents of ``ids`` that the collection holds, in the order of these, each once."""
        wanted = {document_id: quote(document_id) for document_id in ids}
        read = partial(searching.documents, condition=any_of("id", wanted.values()))
        found = self._read(collection, generation, lambda layout: layout.divide(wanted, shards), read)
        return [found[document_id] for document_id in wanted if document_id in found]

    def count(self, collection: str, shards: Shards = None, generation: int | None = None) -> int:
        """Return how many documents the collection holds."""
        return self._read(collection, generation, lambda layout: layout.chosen(shards), searching.count)

    def drop(self, collection: str) -> None:
        """Remove the collection and its documents. It is gone at once; if this fails then, repeat it for its files."""
        drop(self._database, self._catalogue, collection)

    def split(self, collection: str, shards: int) -> Layout:
        """Divide a collection into so many ``shards``, and return the new layout.

        Searches go on meanwhile and find everything; writers wait. The tables of before are removed by ``optimize``,
        some minutes later. Raises StoreUnavailable if that cannot be done: then nothing has changed.
        """
        return self._resharding.split(collection, shards)

    def optimize(
        self, collection: str, shards: Shards = None, generation: int | None = None, *,
        kept: timedelta = KEPT_VERSIONS,
    ) -> bool:  # fmt: skip
        """Compact the tables, bring their indexes up to date, and delete their old versions.

        Tables of layouts that a split has put an end to go ``kept`` after that, those of a split that died at once.
        Returns False if a writer came in between somewhere. That is harmless: the next one does the work. One table
        after the other: each takes what the machine has.
        """

        def compact(layout: Layout) -> bool:
            return all([optimize(self._database, layout.table(shard)) for shard in layout.chosen(shards)])  # noqa: C419

        clean(self._database, self._catalogue, check_collection(collection), kept)
        return self._layouts.read(collection, generation, compact)

    def warm(self, collection: str, shards: Shards = None, generation: int | None = None) -> None:
        """Read the indexes into this process's memory, so that the first search is as quick as the next."""
        self._read(collection, generation, lambda layout: layout.chosen(shards), searching.warm)

    def _ask(
        self, collection: str, query: Query, embedding_model: str | None, shards: Shards, generation: int | None,
        answer: Callable[[Sequence[AsyncTable], Query], Awaitable[T]],
    ) -> T:  # fmt: skip
        def chosen(layout: Layout) -> Sequence[int]:
            if query.mode != "text":
                layout.check_fit(len(query.vector), embedding_model)
            return layout.chosen(shards)

        return self._read(collection, generation, chosen, lambda tables: answer(tables, query))

    def _read(
        self, collection: str, generation: int | None, chosen: Callable[[Layout], Iterable[int]],
        answer: Callable[[Sequence[AsyncTable]], Awaitable[T]],
    ) -> T:  # fmt: skip
        async def ask(layout: Layout) -> T:
            return await answer(await self._layouts.open_to_ask(layout, list(chosen(layout))))

        def work(layout: Layout) -> T:
            with unavailable(collection):
                return self._database.run(lambda: ask(layout))

        return self._layouts.read(collection, generation, work)


def _conditions(
    layout: Layout, shards: Shards, wanted: Mapping[str, str] | None, matching: Sequence[str]
) -> dict[int, str]:
    """Return what the rows to choose meet, by shard, without those where there can be none.

    ``wanted``: ids and their literals; None: any. ``matching``: what all must meet.
    """
    if wanted is None:
        return {shard: " AND ".join(matching) for shard in layout.chosen(shards)}
    parts = layout.divide(wanted, shards)
    return {shard: " AND ".join([any_of("id", literals), *matching]) for shard, literals in parts.items()}
