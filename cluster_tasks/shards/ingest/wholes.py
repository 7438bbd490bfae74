"""Which documents a collection holds, told from the metadata of their passages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from cluster_tasks.shards.ingest.splitting import ADDED_BY, PASSAGE_KEYS, document_of


class Whole(BaseModel):
    """A document that a collection holds, in one piece or in passages."""

    model_config = ConfigDict(frozen=True)

    id: str
    metadata: dict[str, str | int | float | bool]
    """Its own, without what its passages have beside it."""
    passages: int
    complete: bool
    """Whether all of its passages are there, of one version. If not, it is added again, or just then was."""


@dataclass(slots=True)
class _Pieces:
    metadata: dict[str, Any]
    expected: int
    added_by: Any
    found: int = 0
    alike: bool = True

    def add(self, metadata: dict[str, Any], number: int, expected: int, added_by: Any) -> None:
        self.found += 1
        same = (metadata, expected, added_by) == (self.metadata, self.expected, self.added_by)
        self.alike &= same and number < expected


def wholes(stored: Iterable[tuple[str, Mapping[str, Any]]], after: str, limit: int) -> list[Whole]:
    """Put together the documents of which ids and metadata are ``stored``, in any order.

    Returns the ``limit`` whose ids are the least after ``after``, in their order.
    """
    documents: dict[str, _Pieces] = {}
    ceiling: str | None = None
    for stored_id, metadata in stored:
        document = document_of(stored_id, metadata)
        document_id = stored_id if document is None else document
        if document_id <= after or (ceiling is not None and document_id > ceiling):
            continue
        number, expected = (0, 1) if document is None else (metadata["passage"], metadata["passages"])
        added_by = None if document is None else metadata.get(ADDED_BY)
        common = {key: value for key, value in metadata.items() if document is None or key not in PASSAGE_KEYS}
        documents.setdefault(document_id, _Pieces(common, expected, added_by)).add(common, number, expected, added_by)
        if len(documents) > 2 * limit:
            # So a page of a large collection takes no more memory than one of a small collection.
            documents = {each: documents[each] for each in sorted(documents)[:limit]}
            ceiling = max(documents)
    return [_whole(each, documents[each]) for each in sorted(documents)[:limit]]


def _whole(document_id: str, pieces: _Pieces) -> Whole:
    complete = pieces.alike and pieces.found == pieces.expected
    return Whole(id=document_id, metadata=pieces.metadata, passages=pieces.found, complete=complete)
