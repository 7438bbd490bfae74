"""How a collection is divided: its shards, the tables that hold them, and the shard of a document."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TypeVar

from cluster_tasks.errors import CollectionMismatch, InvalidArguments

COLLECTION = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
TABLE = re.compile(rf"(?P<collection>{COLLECTION.pattern})\.g(?P<generation>\d+)\.(?P<shard>\d+)of(?P<shards>\d+)")
MAX_SHARDS = 1024
"""A search opens the table of every shard, in about a millisecond each."""

T = TypeVar("T")


def check_collection(name: str) -> str:
    """Return ``name`` if it can name a collection. Raises InvalidArguments."""
    if not COLLECTION.fullmatch(name):
        raise InvalidArguments(f"collection {name!r} does not match {COLLECTION.pattern}")
    return name


def check_shards(number: int) -> int:
    """Return ``number`` if a collection can have so many shards. Raises InvalidArguments."""
    if not 1 <= number <= MAX_SHARDS:
        raise InvalidArguments(f"{number} shards: expected a number between 1 and {MAX_SHARDS}")
    return number


def shard_of(document_id: str, shards: int) -> int:
    """Return the shard of a document, from 0: the BLAKE2b hash of its id modulo the number of shards.

    It depends on nothing else, now and later: where a document is stored must be where it is looked for.
    """
    digest = blake2b(document_id.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") % shards


def check_fit(
    collection: str, held: tuple[str, int], dimensions: int, embedding_model: str | None = None
) -> None:  # fmt: skip
    """Raise CollectionMismatch for vectors of another dimension or, if it is named, of another model.

    ``held``: the model and the dimensions of the vectors that the collection holds.
    """
    if dimensions != held[1] or embedding_model not in (None, held[0]):
        asked = f"{dimensions} dimensions" + (f" by {embedding_model!r}" if embedding_model else "")
        raise CollectionMismatch(
            f"collection {collection!r} holds vectors of {held[1]} dimensions by {held[0]!r}; got {asked}"
        )


@dataclass(frozen=True, slots=True)
class Layout:
    """A collection as it is stored: what its vectors are, and which tables hold its documents.

    Every change of the number of shards makes a new *generation*, whose tables are others.
    """

    collection: str
    generation: int
    shards: int
    embedding_model: str
    dimensions: int

    def table(self, shard: int) -> str:
        """Return the name of the table of a shard. No collection has a dot in its name."""
        return f"{self.collection}.g{self.generation}.{shard}of{self.shards}"

    def chosen(self, shards: Iterable[int] | None) -> list[int]:
        """Return the numbers ``shards``, each once and in order; None: all. Raises InvalidArguments."""
        if shards is None:
            return list(range(self.shards))
        chosen = sorted(set(shards))
        if wrong := [shard for shard in chosen if not 0 <= shard < self.shards]:
            raise InvalidArguments(f"collection {self.collection!r} has {self.shards} shards, from 0; not {wrong}")
        return chosen

    def divide(self, items: Mapping[str, T], shards: Iterable[int] | None = None) -> dict[int, list[T]]:
        """Divide what is known by document ids among the shards of the documents, without those not in ``shards``."""
        chosen, divided = set(self.chosen(shards)), dict[int, list[T]]()
        for document_id, item in items.items():
            if (shard := shard_of(document_id, self.shards)) in chosen:
                divided.setdefault(shard, []).append(item)
        return divided

    def check_fit(self, dimensions: int, embedding_model: str | None = None) -> None:
        """Raise CollectionMismatch for vectors of another dimension or, if it is named, of another model."""
        check_fit(self.collection, (self.embedding_model, self.dimensions), dimensions, embedding_model)


def generations(tables: Sequence[str], collection: str) -> dict[int, list[str]]:
    """Return the ``tables`` that are shards of a collection, by generation."""
    found: dict[int, list[str]] = {}
    for name in tables:
        if (match := TABLE.fullmatch(name)) and match["collection"] == collection:
            found.setdefault(int(match["generation"]), []).append(name)
    return found
