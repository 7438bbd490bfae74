"""Metadata filters as Qdrant understands them, and the metadata that they read.

Metadata are stored under the key with its kind before it (``documents.stored_key``), as text, number or truth value. So
a filter reads each key as one kind only, and means the same as with LanceDB. Qdrant has no order of texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from qdrant_client import models

from cluster_tasks.errors import InvalidArguments
from cluster_tasks.shards.documents import stored_key
from cluster_tasks.shards.filters import COMPARISONS, Condition

METADATA = "metadata"


def stored_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``metadata`` as a point's payload has it."""
    return {stored_key(key, value): value for key, value in metadata.items()}


def read_metadata(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata of which ``stored_metadata`` made ``stored``."""
    return {key[2:]: value for key, value in stored.items()}


def field(key: str, value: Any) -> str:
    """Return where values of the kind of ``value`` are found. No key has a quote in it."""
    return f'{METADATA}."{stored_key(key, value)}"'


def filter_of(conditions: Iterable[Condition], point_ids: Iterable[str] | None = None) -> models.Filter | None:
    """Return what points meet that have one of ``point_ids``, if given, and all ``conditions``; None: any does.

    Raises InvalidArguments for what Qdrant cannot compare.
    """
    must: list[models.Condition] = []
    must_not: list[models.Condition] = []
    if point_ids is not None:
        must.append(models.HasIdCondition(has_id=list(point_ids)))
    for condition in conditions:
        if condition.operator in COMPARISONS:
            must.append(_compared(condition))
        else:
            (must_not if condition.operator == "ne" else must).append(_one_of(condition))
    return models.Filter(must=must, must_not=must_not) if must or must_not else None


def _compared(condition: Condition) -> models.FieldCondition:
    key, operator, (value,) = condition
    if isinstance(value, str):
        raise InvalidArguments(f"where: {key!r}, {operator!r}: Qdrant orders numbers only, not {value!r}")
    return models.FieldCondition(key=field(key, value), range=models.Range(**{operator: value}))


def _one_of(condition: Condition) -> models.Condition:
    key, texts = condition.key, [value for value in condition.values if isinstance(value, str)]
    equal: list[models.Condition] = [_equal(key, value) for value in condition.values if not isinstance(value, str)]
    if texts:
        equal.append(models.FieldCondition(key=field(key, ""), match=models.MatchAny(any=texts)))
    # "One of none" is no filter for Qdrant, and would let all pass.
    return models.Filter(should=equal) if equal else models.HasIdCondition(has_id=[])


def _equal(key: str, value: Any) -> models.FieldCondition:
    if isinstance(value, bool):
        return models.FieldCondition(key=field(key, value), match=models.MatchValue(value=value))
    # A match compares integers only.
    return models.FieldCondition(key=field(key, value), range=models.Range(gte=value, lte=value))
