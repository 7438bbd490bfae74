"""What a collection holds and what a search returns, and how metadata is stored so that it can be filtered."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from hashlib import blake2b
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

MAX_INTEGER = 2**53
"""Largest integer that a double holds exactly (RFC 7493, section 2.2): filters compare numbers as doubles."""
KEY = re.compile(r"\w[\w .:/@-]{0,127}")


def check_key(key: str) -> str:
    """Return ``key`` if it can name a metadata field. Raises ValueError."""
    if not KEY.fullmatch(key):
        raise ValueError(f"metadata key {key!r} does not match {KEY.pattern}")
    return key


def check_value(value: object) -> object:
    """Return ``value`` if it can be a metadata value. Raises ValueError."""
    if not isinstance(value, str | int | float):
        raise ValueError(f"a metadata value is text, a number or a truth value, not {type(value).__name__}")
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        raise ValueError(f"{value} is beyond 2**53, where numbers lose digits; store it as text")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is not a finite number")
    if isinstance(value, str):
        value.encode()  # A lone surrogate is no text that can be stored; it fails here.
    return value


Key = Annotated[str, AfterValidator(check_key)]
Value = Annotated[str | int | float | bool, BeforeValidator(check_value)]
Metadata = Mapping[Key, Value]
Mode = Literal["vector", "text", "hybrid"]
"""How a collection is searched: by the nearness of vectors, by the words of texts (BM25), or by both, fused."""
DocumentId = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=512)]


def content_id(text: str, metadata: Mapping[str, Any]) -> str:
    """Return the id of a document that brought none: 32 hexadecimal digits of the BLAKE2b hash of its content."""
    canonical = json.dumps(metadata, sort_keys=True, separators=(",", ":"))
    return blake2b(f"{text}\0{canonical}".encode(), digest_size=16).hexdigest()


class Document(BaseModel):
    """A text with what is known about it. Without an id, equal text and metadata give an equal id."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str = Field(min_length=1)
    metadata: Metadata = Field(default_factory=dict)
    id: DocumentId = Field(default_factory=lambda data: content_id(data["text"], data["metadata"]))

    @model_validator(mode="before")
    @classmethod
    def _none_is_no_id(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and "id" in data and data["id"] is None:
            return {key: value for key, value in data.items() if key != "id"}
        return data


class Passage(BaseModel):
    """A document that a search found."""

    model_config = ConfigDict(frozen=True)

    id: str
    text: str
    metadata: dict[str, str | int | float | bool]
    score: float
    """Higher is better. What it is depends on the mode.

    ``vector``: the cosine similarity to the query, -1 to 1; ``text``: BM25, above 0, to be compared within one search
    only; ``hybrid``: the mean of what it has of the best of both, 0 to 1, to be compared within one search only.
    """


class Candidates(BaseModel):
    """What a search found in some of the shards, for those who put it together with what others found."""

    model_config = ConfigDict(frozen=True)

    nearest: list[Passage]
    """By their vectors, best first."""
    matching: list[Passage]
    """By their words, best first."""


def stored_key(key: str, value: object) -> str:
    """Return ``key`` with the kind of ``value`` before it: ``b:`` truth value, ``s:`` text, ``n:`` number.

    A filter reads each key as one kind only: ``"2020"`` never equals 2020, and no value fails a conversion.
    """
    kind = "b" if isinstance(value, bool) else "s" if isinstance(value, str) else "n"
    return f"{kind}:{key}"


def encode_metadata(metadata: Mapping[str, Any]) -> str:
    """Return ``metadata`` as the JSON that a table stores."""
    return json.dumps({stored_key(key, value): value for key, value in metadata.items()}, allow_nan=False)


def decode_metadata(stored: str) -> dict[str, Any]:
    """Return the metadata of which ``encode_metadata`` made ``stored``."""
    return {key[2:]: value for key, value in json.loads(stored).items()}
