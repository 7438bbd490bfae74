"""JSON of plain values, written and read by pydantic's parser: a vector in a tenth of the time that Python's takes.

Plain are texts, numbers, truth values and None, lists and dicts of them. All else, and whatever that parser refuses, is
left to Celery: nobody is to see a difference but in time.
"""

from __future__ import annotations

from typing import Any

from pydantic_core import SchemaValidator, from_json, to_json
from pydantic_core.core_schema import is_instance_schema, list_schema

_SCALARS = frozenset({str, int, float, bool, type(None)})
_TEXTS = frozenset({str})
# A float_schema, though strict, takes whatever can be made a float of: a Decimal, too.
_VECTORS = SchemaValidator(list_schema(is_instance_schema(float), strict=True, fail_fast=True))
_MARK = "__type__"
"""By this Celery knows a value that JSON has no type for."""


def written(value: Any) -> str | None:
    """Return what Celery would read as the same, or None if that has to write it."""
    try:
        return to_json(value).decode() if _is_plain(value) else None
    except (ValueError, RecursionError):
        return None


def read(text: str | bytes) -> Any:
    """Return the value. Raises ValueError if Celery has to read it."""
    is_marked = _MARK.encode() in text if isinstance(text, bytes) else _MARK in text
    if is_marked:
        raise ValueError("a value of a type that JSON does not have")
    return from_json(text)


def _is_plain(value: Any) -> bool:
    kind = type(value)
    if kind in _SCALARS:
        return True
    if kind is dict:
        return _TEXTS.issuperset(map(type, value)) and _are_plain(value.values())
    # For vectors: to ask for the type of each number takes longer than to write all.
    if kind is list and value and type(value[0]) is float and _VECTORS.isinstance_python(value):
        return True
    return (kind is list or kind is tuple) and _are_plain(value)


def _are_plain(values: Any) -> bool:
    return _SCALARS.issuperset(map(type, values)) or all(map(_is_plain, values))
