"""``ClusterVectorStore``, ``ClusterRetriever``: collections, filled and searched by nodes that serve ``retrieval``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

from celery import Celery
from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.retrievers import BaseRetriever
from langchain_core.vectorstores import VectorStore
from pydantic import ConfigDict

from cluster_tasks.errors import CollectionNotFound, ConfigurationError
from cluster_tasks.langchain.embeddings import ClusterEmbeddings, check_batch_size
from cluster_tasks.langchain.sending import Sender
from cluster_tasks.tasks.arguments import AddArguments, CacheUse, Rerank
from cluster_tasks.tasks.base import validate_arguments

ADD, GET, SEARCH = "retrieval.add_documents", "retrieval.get_documents", "retrieval.search"
DELETE = "retrieval.delete_documents"
BATCH = 100
"""Documents of a job, unless its caller says otherwise."""
BATCH_CHARACTERS = 1_000_000
"""A job of several documents holds no more text."""

Filter = dict[str, Any] | None


class ClusterVectorStore(VectorStore):
    """A collection. It is made by the first document; before, it is empty.

    The nodes embed, by the model of their settings. Texts must not be empty, and metadata are texts, numbers and truth
    values: what does not fit raises InvalidArguments, which names it, and nothing is sent. ``filter`` is the ``where``
    of the jobs, and further keyword arguments are theirs. See ``Sender`` for ``timeout_s`` and ``app``.
    """

    def __init__(self, collection: str, *, timeout_s: float | None = None, app: Celery | None = None) -> None:
        """No I/O."""
        self.collection = collection
        self._sender = Sender(app, timeout_s)
        self._embeddings = ClusterEmbeddings(timeout_s=timeout_s, app=app)

    @property
    def embeddings(self) -> ClusterEmbeddings:
        """What the nodes embed with."""
        return self._embeddings

    @classmethod
    def from_texts(
        cls, texts: list[str], embedding: Embeddings, metadatas: list[dict[str, Any]] | None = None, *,
        ids: list[str] | None = None, collection: str = "", **kwargs: Any,
    ) -> Self:  # fmt: skip
        """Return ``collection`` with these texts added; ``kwargs`` are those of ``add_texts``."""
        store = cls._with(embedding, collection)
        store.add_texts(texts, metadatas, ids=ids, **kwargs)
        return store

    @classmethod
    async def afrom_texts(
        cls, texts: list[str], embedding: Embeddings, metadatas: list[dict[str, Any]] | None = None, *,
        ids: list[str] | None = None, collection: str = "", **kwargs: Any,
    ) -> Self:  # fmt: skip
        """As ``from_texts``, for asyncio."""
        store = cls._with(embedding, collection)
        await store.aadd_texts(texts, metadatas, ids=ids, **kwargs)
        return store

    def add_texts(
        self, texts: Iterable[str], metadatas: list[dict[str, Any]] | None = None, *, ids: list[str] | None = None,
        batch_size: int = BATCH, **kwargs: Any,
    ) -> list[str]:  # fmt: skip
        """Add texts, or replace those of the same id; return their ids. Without an id, equal texts have an equal one.

        ``split={"size": 1000}`` stores each in passages. Several jobs of ``batch_size`` texts are under way at once:
        when this raises, some of the texts may have been added, and adding them again is harmless.
        """
        ids, calls = self._adding(texts, metadatas, ids, batch_size, kwargs)
        for _ in self._sender.calls(ADD, calls):
            pass
        return ids

    async def aadd_texts(
        self, texts: Iterable[str], metadatas: list[dict[str, Any]] | None = None, *, ids: list[str] | None = None,
        batch_size: int = BATCH, **kwargs: Any,
    ) -> list[str]:  # fmt: skip
        """As ``add_texts``, for asyncio."""
        ids, calls = self._adding(texts, metadatas, ids, batch_size, kwargs)
        async for _ in self._sender.acalls(ADD, calls):
            pass
        return ids

    def delete(self, ids: list[str] | None = None, **kwargs: Any) -> bool:
        """Delete the documents that have one of ``ids`` and match ``filter``, as far as given; return True.

        Raises InvalidArguments if neither is: no job deletes a whole collection.
        """
        self._ask(DELETE, self._chosen(ids, **kwargs))
        return True

    async def adelete(self, ids: list[str] | None = None, **kwargs: Any) -> bool:
        """As ``delete``, for asyncio."""
        await self._aask(DELETE, self._chosen(ids, **kwargs))
        return True

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """Return the documents of ``ids`` that there are, in the order of these."""
        return _documents(self._ask(GET, {"ids": list(ids)}))

    async def aget_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """As ``get_by_ids``, for asyncio."""
        return _documents(await self._aask(GET, {"ids": list(ids)}))

    def similarity_search(
        self, query: str, k: int = 4, filter: Filter = None, **kwargs: Any,  # noqa: A002 - LangChain's name
    ) -> list[Document]:  # fmt: skip
        """Return the ``k`` documents most similar to ``query`` among those that match ``filter``.

        By the nearness of vectors, unless ``mode`` says ``"hybrid"`` or ``"text"``; ``rerank=True`` ranks them anew.
        """
        return _documents(self._ask(SEARCH, _asked(k, filter, kwargs, query=query)))

    async def asimilarity_search(
        self, query: str, k: int = 4, filter: Filter = None, **kwargs: Any,  # noqa: A002 - LangChain's name
    ) -> list[Document]:  # fmt: skip
        """As ``similarity_search``, for asyncio."""
        return _documents(await self._aask(SEARCH, _asked(k, filter, kwargs, query=query)))

    # The arguments of the base class are (*args, **kwargs).
    def similarity_search_with_score(
        self, query: str, k: int = 4, filter: Filter = None, **kwargs: Any,  # noqa: A002 - LangChain's name
    ) -> list[tuple[Document, float]]:  # fmt: skip
        """As ``similarity_search``, each with its score: the cosine similarity, -1 to 1, higher is better.

        In other modes it is what ``Passage.score`` says.
        """
        return _scored(self._ask(SEARCH, _asked(k, filter, kwargs, query=query)))

    async def asimilarity_search_with_score(
        self, query: str, k: int = 4, filter: Filter = None, **kwargs: Any,  # noqa: A002 - LangChain's name
    ) -> list[tuple[Document, float]]:  # fmt: skip
        """As ``similarity_search_with_score``, for asyncio."""
        return _scored(await self._aask(SEARCH, _asked(k, filter, kwargs, query=query)))

    def similarity_search_by_vector(
        self, embedding: list[float], k: int = 4, filter: Filter = None, **kwargs: Any,  # noqa: A002 - LangChain's name
    ) -> list[Document]:  # fmt: skip
        """Return the ``k`` documents whose vectors are nearest to ``embedding``."""
        return _documents(self._ask(SEARCH, _asked(k, filter, kwargs, vector=embedding)))

    async def asimilarity_search_by_vector(
        self, embedding: list[float], k: int = 4, filter: Filter = None, **kwargs: Any,  # noqa: A002 - LangChain's name
    ) -> list[Document]:  # fmt: skip
        """As ``similarity_search_by_vector``, for asyncio."""
        return _documents(await self._aask(SEARCH, _asked(k, filter, kwargs, vector=embedding)))

    def max_marginal_relevance_search(
        self, query: str, k: int = 4, fetch_k: int = 20, lambda_mult: float = 0.5, **kwargs: Any
    ) -> list[Document]:
        """Return ``k`` of the ``fetch_k`` most similar documents that resemble each other little.

        ``lambda_mult``: 1 minds the similarity to the query alone, 0 the variety. The texts found are embedded again;
        with ``cluster_cache_url`` their vectors are known.
        """
        vector = self.embeddings.embed_query(query)
        return self.max_marginal_relevance_search_by_vector(vector, k, fetch_k, lambda_mult, **kwargs)

    async def amax_marginal_relevance_search(
        self, query: str, k: int = 4, fetch_k: int = 20, lambda_mult: float = 0.5, **kwargs: Any
    ) -> list[Document]:
        """As ``max_marginal_relevance_search``, for asyncio."""
        vector = await self.embeddings.aembed_query(query)
        return await self.amax_marginal_relevance_search_by_vector(vector, k, fetch_k, lambda_mult, **kwargs)

    def max_marginal_relevance_search_by_vector(
        self, embedding: list[float], k: int = 4, fetch_k: int = 20, lambda_mult: float = 0.5, **kwargs: Any
    ) -> list[Document]:
        """As ``max_marginal_relevance_search``, for a vector."""
        found = self.similarity_search_by_vector(embedding, fetch_k, **kwargs)
        vectors = self.embeddings.embed_documents([document.page_content for document in found])
        return _varied(embedding, found, vectors, lambda_mult, k)

    async def amax_marginal_relevance_search_by_vector(
        self, embedding: list[float], k: int = 4, fetch_k: int = 20, lambda_mult: float = 0.5, **kwargs: Any
    ) -> list[Document]:
        """As ``max_marginal_relevance_search_by_vector``, for asyncio."""
        found = await self.asimilarity_search_by_vector(embedding, fetch_k, **kwargs)
        vectors = await self.embeddings.aembed_documents([document.page_content for document in found])
        return _varied(embedding, found, vectors, lambda_mult, k)

    def _select_relevance_score_fn(self) -> Any:
        # What has less than nothing in common is as irrelevant as can be.
        return lambda similarity: max(0.0, similarity)

    @classmethod
    def _with(cls, embedding: Embeddings, collection: str) -> Self:
        if not isinstance(embedding, ClusterEmbeddings) or embedding.model is not None:
            raise ConfigurationError(
                f"embedding={embedding!r}: the nodes embed what is added to a collection, by the model of their "
                "settings: expected ClusterEmbeddings() without a model"
            )
        return cls(collection, timeout_s=embedding.timeout_s, app=embedding.app)

    def _adding(
        self, texts: Iterable[str], metadatas: list[dict[str, Any]] | None, ids: Sequence[str | None] | None,
        batch_size: int, options: Mapping[str, Any],
    ) -> tuple[list[str], Iterator[dict[str, Any]]]:  # fmt: skip
        """Return the ids of texts, and the arguments of the jobs that add them."""
        check_batch_size(batch_size)
        texts = list(texts)
        for name, given in (("metadatas", metadatas), ("ids", ids)):
            if given is not None and len(given) != len(texts):
                raise ValueError(f"{name}: expected one for each of {len(texts)} texts, got {len(given)}")
        documents = [
            {"text": text, "metadata": metadata, "id": document_id}
            for text, metadata, document_id in zip(
                texts, metadatas or [{}] * len(texts), ids or [None] * len(texts), strict=True
            )
        ]
        parsed = validate_arguments(
            ADD, AddArguments, {"collection": self.collection, "documents": documents, **options}
        )
        assert isinstance(parsed, AddArguments)
        # Jobs end in any order: of documents with one id only the last is sent.
        last = {document.id: document.model_dump(mode="json") for document in parsed.documents}
        batches = _in_batches(last.values(), batch_size)
        calls = ({"collection": self.collection, "documents": some, **options} for some in batches)
        return [document.id for document in parsed.documents], calls

    def _chosen(self, ids: list[str] | None, filter: Filter = None) -> dict[str, Any]:  # noqa: A002 - as in a search
        return {"ids": ids, "where": filter}

    # Whoever asks for what was never filled finds nothing.

    def _ask(self, job: str, arguments: Mapping[str, Any]) -> Any:
        try:
            return self._sender.call(job, collection=self.collection, **arguments)
        except CollectionNotFound:
            return {}

    async def _aask(self, job: str, arguments: Mapping[str, Any]) -> Any:
        try:
            return await self._sender.acall(job, collection=self.collection, **arguments)
        except CollectionNotFound:
            return {}


class ClusterRetriever(BaseRetriever):
    """Finds the ``k`` best passages of a collection, by vectors and by words unless ``mode`` says otherwise.

    All but ``timeout_s`` and ``app``, for which see ``Sender``, may be given to a call as well and are those of the job
    ``retrieval.search``. Raises CollectionNotFound where there is no collection of that name.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    collection: str
    k: int = 5
    filter: dict[str, Any] | None = None
    mode: str | None = None
    rerank: Rerank = None
    candidates: int | None = None
    cache: CacheUse = None
    timeout_s: float | None = None
    app: Celery | None = None

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, **kwargs: Any
    ) -> list[Document]:
        return _documents(Sender(self.app, self.timeout_s).call(SEARCH, **self._asked(query, kwargs)))

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, **kwargs: Any
    ) -> list[Document]:
        return _documents(await Sender(self.app, self.timeout_s).acall(SEARCH, **self._asked(query, kwargs)))

    def _asked(self, query: str, given: Mapping[str, Any]) -> dict[str, Any]:
        names = ("collection", "k", "filter", "mode", "rerank", "candidates", "cache")
        arguments = {"query": query} | {name: getattr(self, name) for name in names} | dict(given)
        return {"where": arguments.pop("filter"), **arguments}


def _asked(k: int, where: Filter, options: Mapping[str, Any], **what: Any) -> dict[str, Any]:
    return {**what, "k": k, "where": where, "mode": "vector", **options}


def _in_batches(documents: Iterable[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    characters = 0
    for document in documents:
        characters += len(document["text"])
        if batch and (len(batch) == size or characters > BATCH_CHARACTERS):
            yield batch
            batch, characters = [], len(document["text"])
        batch.append(document)
    if batch:
        yield batch


def _documents(result: Mapping[str, Any]) -> list[Document]:
    return [_document(stored) for stored in result.get("passages", result.get("documents", ()))]


def _scored(result: Mapping[str, Any]) -> list[tuple[Document, float]]:
    return [(_document(passage), passage["score"]) for passage in result.get("passages", ())]


def _document(stored: Mapping[str, Any]) -> Document:
    return Document(id=stored["id"], page_content=stored["text"], metadata=stored["metadata"])


def _varied(
    vector: list[float], found: Sequence[Document], vectors: list[list[float]], lambda_mult: float, k: int
) -> list[Document]:  # fmt: skip
    import numpy as np
    from langchain_core.vectorstores.utils import maximal_marginal_relevance

    return [found[place] for place in maximal_marginal_relevance(np.array(vector), vectors, lambda_mult, k)]
