"""The arguments of the ready-made jobs: what does not fit is refused in the caller, and again in the worker.

They are models of their own and not the providers' requests: a process that only sends jobs loads no numpy.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    StringConstraints,
    model_validator,
)

from cluster_tasks.errors import InvalidArguments
from cluster_tasks.shards.documents import Document, DocumentId, Mode
from cluster_tasks.shards.filters import compile_where
from cluster_tasks.shards.ingest.splitting import MAX_WHOLE_ID, PASSAGE_KEYS, Split, document_of, names_passage

MAX_K = 10_000
"""The most passages that a search returns, as in the store."""
MAX_LISTED = 10_000
"""The most documents that one job lists or returns."""
MAX_CANDIDATES = 1000
"""The most passages that are ranked anew: providers take no more in a request."""
OPTIMIZE_WITHIN_S = 3600.0
"""So long one job is let alone with a collection, and a job waits for its turn before it is not run any more."""

NOT_EXTRA = frozenset({"prompt", "messages", "passages", "tools", "extra", "stream"})
"""No further parameters of a provider: a job has them under this name, or cannot have them."""


def _check_message(message: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(message.get("role"), str):
        raise ValueError("a message needs a role, such as 'user'")
    return message


def _check_extra(extra: dict[str, Any]) -> dict[str, Any]:
    if taken := sorted(extra.keys() & NOT_EXTRA):
        raise ValueError(f"{', '.join(taken)} cannot be passed on to the provider")
    return extra


def _check_where(where: dict[str, Any]) -> dict[str, Any]:
    try:
        compile_where(where)
    except InvalidArguments as exc:
        raise ValueError(str(exc).removeprefix("where: ")) from None
    return where


def _check_rerank(rerank: bool | str | None, candidates: int | None, k: int) -> None:
    if not rerank:
        if candidates is not None:
            raise ValueError("candidates are what rerank chooses from: expected rerank, too")
    elif k > MAX_CANDIDATES:
        raise ValueError(f"with rerank, k is {MAX_CANDIDATES} at most")
    elif candidates is not None and candidates < k:
        raise ValueError(f"{candidates} candidates are fewer than k={k}")


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _as_document(value: object) -> object:
    return {"text": value} if isinstance(value, str) else value


Text = Annotated[str, Field(min_length=1)]
Message = Annotated[dict[str, Any], AfterValidator(_check_message)]
Extra = Annotated[dict[str, Any], AfterValidator(_check_extra)]
Collection = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
Count = Annotated[int, Field(ge=1, le=MAX_K)]
Where = Annotated[dict[str, Any], AfterValidator(_check_where)]
CacheUse = Annotated[bool, Field(strict=True)] | Literal["refresh"] | None
"""False: neither read nor kept; ``"refresh"``: computed anew and kept; True: kept although it would not be; None: as is
usual."""
Rerank = Annotated[bool, Field(strict=True)] | Text | None
"""True: by the model of the settings; a name: by that model; ``"local"``: by ``local-mmr``."""
Candidates = Annotated[int, Field(ge=1, le=MAX_CANDIDATES)] | None


class _Arguments(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Sampling(_Arguments):
    """How a language model is to answer. What is None is left to the provider."""

    model: Text | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: str | list[str] | None = None
    response_format: dict[str, Any] | None = None
    session_id: str | None = None
    allow_degraded: bool = True
    cache: CacheUse = None
    extra: Extra = Field(default_factory=dict)


class GenerateArguments(Sampling):
    """Of ``llm.generate``."""

    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    tools: list[dict[str, Any]] | None = None
    passages: list[Text] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("expected either prompt or messages")
        if self.passages and self.prompt is None:
            raise ValueError("passages go with a prompt; put them into the messages yourself")
        return self


class EmbedArguments(_Arguments):
    """Of ``embedding.embed``."""

    texts: Annotated[list[Text], Field(min_length=1), BeforeValidator(_listed)]
    model: Text | None = None
    cache: CacheUse = None


class AddArguments(_Arguments):
    """Of ``retrieval.add_documents``."""

    collection: Collection
    documents: list[Annotated[Document, BeforeValidator(_as_document)]]
    split: Split | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        for number, document in enumerate(self.documents):
            if names_passage(document.id) and document_of(document.id, document.metadata) is None:
                raise ValueError(f"documents.{number}: {document.id!r} is an id as passages of split documents have")
            if self.split is None:
                continue
            if taken := sorted(document.metadata.keys() & set(PASSAGE_KEYS)):
                raise ValueError(f"documents.{number}: split passages have a metadata {taken[0]!r} of their own")
            if len(document.id) > MAX_WHOLE_ID:
                raise ValueError(f"documents.{number}: with split, an id has at most {MAX_WHOLE_ID} characters")
        return self


class SearchArguments(_Arguments):
    """Of ``retrieval.search``."""

    collection: Collection
    query: Text | None = None
    vector: Annotated[list[FiniteFloat], Field(min_length=1)] | None = None
    k: Count = 5
    where: Where | None = None
    mode: Mode | None = None
    allow_partial: Annotated[bool, Field(strict=True)] = False
    cache: CacheUse = None
    rerank: Rerank = None
    candidates: Candidates = None
    allow_degraded: bool = True

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.query is None) == (self.vector is None):
            raise ValueError("expected either query or vector")
        if self.query is None and self.mode not in (None, "vector"):
            raise ValueError(f"mode {self.mode!r} needs a query")
        if self.query is None and self.rerank:
            raise ValueError("rerank needs a query")
        _check_rerank(self.rerank, self.candidates, self.k)
        return self


class GetArguments(_Arguments):
    """Of ``retrieval.get_documents``."""

    collection: Collection
    ids: Annotated[list[DocumentId], Field(max_length=MAX_LISTED)]


class ListArguments(_Arguments):
    """Of ``retrieval.list_documents``."""

    collection: Collection
    where: Where | None = None
    after: str = ""
    limit: Annotated[int, Field(ge=1, le=MAX_LISTED)] = 1000


class DeleteArguments(_Arguments):
    """Of ``retrieval.delete_documents``."""

    collection: Collection
    ids: list[DocumentId] | None = None
    where: Where | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.ids is None and not self.where:
            raise ValueError("expected ids or where: a whole collection is not deleted by a job")
        return self


class OptimizeArguments(_Arguments):
    """Of ``retrieval.optimize``."""

    collection: Collection | None = None


class AnswerArguments(Sampling):
    """Of ``rag.answer``."""

    question: Text
    collection: Collection
    k: Count = 5
    where: Where | None = None
    mode: Mode | None = None
    rerank: Rerank = None
    candidates: Candidates = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_rerank(self.rerank, self.candidates, self.k)
        return self
