"""What a backend of language models, embeddings or rankings is asked, what it answers, and the three protocols.

Requests and results are frozen and go through JSON: ``model_dump(mode="json")`` turns vectors into lists.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator, model_validator


def _matrix(value: object) -> NDArray[np.float32]:
    matrix = np.asarray(value, dtype=np.float32)
    if matrix.ndim != 2:
        raise ValueError(f"expected vectors of one dimension, as an array of shape (n, d), not {matrix.shape}")
    return matrix


def _lists(matrix: NDArray[np.float32]) -> list[list[float]]:
    rows: list[list[float]] = matrix.tolist()
    return rows


Vectors = Annotated[
    NDArray[np.float32],
    PlainValidator(_matrix),
    PlainSerializer(_lists, return_type=list[list[float]], when_used="json"),
]
"""float32, shape (texts, dimensions)."""


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ChatRequest(_Value):
    """One question to a language model. What is None is left to the provider."""

    messages: tuple[Mapping[str, Any], ...] = Field(min_length=1)
    """As in the chat completions API: each has a ``role`` and, as a rule, a ``content``."""
    model: str | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    max_tokens: int | None = Field(default=None, gt=0)
    stop: str | list[str] | None = None
    tools: list[dict[str, Any]] | None = None
    response_format: dict[str, Any] | None = None
    extra: dict[str, Any] = Field(default_factory=dict)
    """Further parameters of the request body, sent as they are."""
    passages: tuple[str, ...] = ()
    """Texts that ``local-extractive`` answers from; other providers do not see them."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for position, message in enumerate(self.messages):
            if not isinstance(message.get("role"), str):
                raise ValueError(f"messages[{position}] has no role")
        # Whether a reply is streamed is the method's to say, and a second value of a parameter would silently win.
        if taken := sorted(self.extra.keys() & {*type(self).model_fields, "stream"}):
            raise ValueError(f"extra must not hold {', '.join(taken)}")
        return self


class Usage(_Value):
    """What a request cost, in the provider's tokens; zeros if it did not say."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0


class Quote(_Value):
    """A part of an answer that is one of a passage, but for white space. Places are those of characters, from 0."""

    start: int
    end: int
    passage: int
    """Its number, from 1."""
    passage_start: int
    passage_end: int


class Answer(_Value):
    """What one of several providers answered."""

    degraded: bool = False
    """Whether something else answered than the first provider, for that was not to be had."""
    degraded_reason: str = ""
    """Why: ``circuit_open``, ``rate_limited`` or ``unavailable``."""


class ChatResult(Answer):
    """What the model answered."""

    text: str
    """Empty if the model only called tools."""
    tool_calls: list[dict[str, Any]] = Field(default_factory=list)
    model: str
    usage: Usage = Usage()
    finish_reason: str = "stop"
    """``stop``, ``length``, ``tool_calls`` or a word of the provider."""
    provider: str
    cached: bool = False
    """Whether it was made before, for an equal request."""
    age_s: float = 0.0
    """How long ago that was."""
    quotes: list[Quote] = Field(default_factory=list)
    """Where the text was taken from the passages as it is; only ``local-extractive`` knows."""


class EmbeddingRequest(_Value):
    """Texts to embed in one call. Providers do not split it: the limits of the server apply."""

    texts: tuple[str, ...] = Field(min_length=1)
    model: str | None = None


class EmbeddingResult(_Value):
    """One vector for each text, in their order."""

    vectors: Vectors
    model: str
    usage: Usage = Usage()
    provider: str
    cached: bool = False
    """Whether all of them were made before."""


class RerankRequest(_Value):
    """Texts that a search found, the best first, to be ranked anew."""

    query: str
    texts: tuple[str, ...] = Field(min_length=1)
    scores: tuple[float, ...]
    """What the search gave each text, to be compared with each other only."""
    top: int = Field(ge=1)
    """So many of them are wanted."""
    model: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.scores) != len(self.texts):
            raise ValueError(f"{len(self.texts)} texts have {len(self.scores)} scores")
        return self


class Rank(_Value):
    """A place in a ranking."""

    index: int
    """Of the text, from 0."""
    score: float | None = None
    """Higher is better, on a scale of the model's own; None: nobody has judged it."""


class RerankResult(Answer):
    """The best texts, best first: as many as were wanted, if there were so many."""

    ranking: list[Rank]
    model: str
    usage: Usage = Usage()
    provider: str


Tell = Callable[[str], None]
"""Takes a piece of an answer, of one character or more, as soon as it is there. What it raises ends the request."""


class ChatProvider(Protocol):
    """A backend of language models. Safe to share between threads and to carry across a fork."""

    @property
    def name(self) -> str:
        """What answers, for logs and results."""

    def chat(self, request: ChatRequest) -> ChatResult:
        """Answer ``request``.

        Raises ProviderError if it was refused, ProviderUnavailable if nothing useful came back after all
        retries, ConfigurationError if no model is configured that could answer it.
        """

    def stream(self, request: ChatRequest, tell: Tell) -> ChatResult:
        """Answer as ``chat`` does, and tell the text meanwhile: its pieces, joined, are the text of the result.

        Raises as ``chat`` does, maybe after some of it was told. Nothing is repeated by itself from then on.
        """

    def close(self) -> None:
        """Release connections. Safe to repeat; a later call opens them again."""


class EmbeddingProvider(Protocol):
    """A backend of embeddings. Safe to share between threads and to carry across a fork."""

    @property
    def name(self) -> str:
        """What answers, for logs and results."""

    def embed(self, request: EmbeddingRequest) -> EmbeddingResult:
        """Embed the texts of ``request``. Raises as ``ChatProvider.chat`` does."""

    def close(self) -> None:
        """Release connections. Safe to repeat; a later call opens them again."""


class RerankProvider(Protocol):
    """A backend of rankings. Safe to share between threads and to carry across a fork."""

    @property
    def name(self) -> str:
        """What answers, for logs and results."""

    def rerank(self, request: RerankRequest) -> RerankResult:
        """Rank the texts of ``request``. Raises as ``ChatProvider.chat`` does."""

    def close(self) -> None:
        """Release connections. Safe to repeat; a later call opens them again."""
