"""Metadata filters, checked, and compiled to the SQL that LanceDB evaluates before it ranks.

``{"lang": "py", "year": {"gte": 2020, "lt": 2024}, "tag": {"in": ["a", "b"]}}`` matches the documents that
meet all conditions. A document without the key, or with a value of another kind (text, number, truth value),
meets none on it but ``ne``. Text is ordered by code point.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from cluster_tasks.errors import InvalidArguments, did_you_mean
from cluster_tasks.shards.documents import check_key, check_value, stored_key

Where = Mapping[str, Any]
"""Metadata key → a value, or operators with their operands."""

COMPARISONS = {"gt": ">", "gte": ">=", "lt": "<", "lte": "<="}
OPERATORS = ("eq", "ne", "in", *COMPARISONS)
MAX_CONDITIONS = 256
"""A chain of 100,000 overflowed LanceDB's stack and ended the process."""
_READERS = {"s": "json_get_string", "n": "json_get_float", "b": "json_get_bool"}


class Condition(NamedTuple):
    """What the metadata of a document must meet."""

    key: str
    operator: str
    """One of OPERATORS."""
    values: tuple[Any, ...]
    """Text, numbers and truth values; one of them, but for ``in``."""


def conditions_of(where: Where) -> list[Condition]:
    """Return the conditions of ``where``. Raises InvalidArguments that names the key."""
    if not isinstance(where, Mapping):
        raise InvalidArguments(f"where: expected a mapping, got {where!r}")
    conditions = [_condition(key, name, operand) for key, name, operand in _flatten(where)]
    if len(conditions) > MAX_CONDITIONS:
        raise InvalidArguments(f"where: {len(conditions)} conditions, more than {MAX_CONDITIONS}")
    return conditions


def compile_where(where: Where) -> str:
    """Return the SQL of ``where``; empty without conditions. Raises InvalidArguments that names the key."""
    return to_sql(conditions_of(where))


def to_sql(conditions: Iterable[Condition]) -> str:
    """Return the SQL that is true where all ``conditions`` are met; empty without any."""
    return " AND ".join(map(_sql, conditions))


def quote(text: str) -> str:
    """Return ``text`` as an SQL literal. Doubled quotes are its only escape: a backslash means itself."""
    return "'" + text.replace("'", "''") + "'"


def any_of(expression: str, literals: Iterable[str]) -> str:
    """Return the SQL for "``expression`` is one of ``literals``", none of which matches nothing."""
    listed = ", ".join(literals)
    return f"{expression} IN ({listed})" if listed else "false"


def _flatten(where: Where) -> Iterator[tuple[str, str, Any]]:
    for key, condition in where.items():
        operators = condition if isinstance(condition, Mapping) else {"eq": condition}
        if not operators:
            raise InvalidArguments(f"where: {key!r} has no operator")
        for name, operand in operators.items():
            yield key, name, operand


def _condition(key: str, name: str, operand: Any) -> Condition:
    try:
        check_key(key)
        if name == "in":
            return Condition(key, name, tuple(_elements(operand)))
        if name in OPERATORS:
            value = check_value(operand)
            if name in COMPARISONS and isinstance(value, bool):
                raise TypeError("truth values have no order")
            return Condition(key, name, (value,))
    except (TypeError, ValueError) as exc:
        raise InvalidArguments(f"where: {key!r}, {name!r}: {exc}") from None
    raise InvalidArguments(f"where: {key!r}: unknown operator {name!r}{did_you_mean(str(name), OPERATORS)}")


def _elements(operand: Any) -> list[Any]:
    if not isinstance(operand, list | tuple | set | frozenset):
        raise TypeError(f"expected a list of values, got {operand!r}")
    return [check_value(element) for element in operand]


def _sql(condition: Condition) -> str:
    key, name, values = condition
    if name in COMPARISONS:
        return f"{_field(key, values[0])} {COMPARISONS[name]} {_literal(values[0])}"
    equal = _one_of(key, values)
    return f"NOT coalesce({equal}, false)" if name == "ne" else equal


def _one_of(key: str, values: Iterable[Any]) -> str:
    literals: dict[str, list[str]] = {}
    for value in values:
        literals.setdefault(_field(key, value), []).append(_literal(value))
    return "(" + (" OR ".join(any_of(field, group) for field, group in literals.items()) or "false") + ")"


def _field(key: str, value: Any) -> str:
    stored = stored_key(key, value)
    return f"{_READERS[stored[0]]}(metadata, {quote(stored)})"


def _literal(value: Any) -> str:
    if isinstance(value, str):
        return quote(value)
    return str(value).lower() if isinstance(value, bool) else repr(float(value))
