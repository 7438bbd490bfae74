"""``ClusterEmbeddings``: texts become vectors on the nodes that serve ``embedding``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from celery import Celery
from langchain_core.embeddings import Embeddings

from cluster_tasks.langchain.sending import Sender
from cluster_tasks.tasks.arguments import CacheUse

EMBED = "embedding.embed"
BATCH = 64
"""Texts of a job, which embeds so many in one request."""


class ClusterEmbeddings(Embeddings):
    """Embeds by ``embedding.embed``, ``batch_size`` texts a job, several jobs at once.

    ``model``: None, the one of the nodes' settings. ``cache`` is that of the job. Raises as the job fails, and
    InvalidArguments for an empty text; see ``Sender`` for ``timeout_s`` and ``app``.
    """

    def __init__(
        self, model: str | None = None, *, batch_size: int = BATCH, cache: CacheUse = None,
        timeout_s: float | None = None, app: Celery | None = None,
    ) -> None:  # fmt: skip
        """No I/O. Raises ValueError for a ``batch_size`` below 1."""
        check_batch_size(batch_size)
        self.model, self.batch_size, self.cache, self.timeout_s, self.app = model, batch_size, cache, timeout_s, app

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Return a vector for each text, in their order."""
        return [vector for done in self._sender.calls(EMBED, self._calls(texts)) for vector in done["vectors"]]

    def embed_query(self, text: str) -> list[float]:
        """Return the vector of a text."""
        return self.embed_documents([text])[0]

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        """Return a vector for each text, in their order."""
        done = self._sender.acalls(EMBED, self._calls(texts))
        return [vector async for one in done for vector in one["vectors"]]

    async def aembed_query(self, text: str) -> list[float]:
        """Return the vector of a text."""
        return (await self.aembed_documents([text]))[0]

    @property
    def _sender(self) -> Sender:
        return Sender(self.app, self.timeout_s)

    def _calls(self, texts: Sequence[str]) -> Iterator[dict[str, Any]]:
        for start in range(0, len(texts), self.batch_size):
            yield {"texts": list(texts[start : start + self.batch_size]), "model": self.model, "cache": self.cache}


def check_batch_size(batch_size: int) -> None:
    """Raise ValueError if jobs cannot have so many texts each."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r}: expected at least 1, the texts of a job")
