"""``ClusterCache``: LangChain's cache of answers, in the cache of the cluster."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from celery import Celery
from langchain_core.caches import BaseCache
from langchain_core.messages import message_to_dict, messages_from_dict
from langchain_core.outputs import ChatGeneration, Generation
from pydantic_core import from_json, to_json

from cluster_tasks.cache import Cache
from cluster_tasks.langchain.sending import Sender
from cluster_tasks.tasks.apps import cluster_of
from cluster_tasks.tasks.kept import digest

logger = logging.getLogger(__name__)


class ClusterCache(BaseCache):
    """Keeps the answers of any LangChain model for all processes of the cluster, under digests of what was asked.

    They are in the namespace ``namespace`` of ``tenant`` for ``ttl_s``, None: ``cluster_cache_ttl_s``. Without
    ``cluster_cache_url`` each process has its own. An answer that another provider gave because the first was not to be
    had is not kept. Cache and jobs do not fail for want of each other: a cache that is away is a miss; ``clear`` alone
    raises CacheUnavailable.
    """

    def __init__(
        self, *, namespace: str = "langchain", tenant: str = "", ttl_s: float | None = None, app: Celery | None = None
    ) -> None:
        """No I/O."""
        self._namespace, self._tenant, self._ttl_s, self._sender = namespace, tenant, ttl_s, Sender(app, None)

    def lookup(self, prompt: str, llm_string: str) -> Sequence[Generation] | None:
        """Return what is kept for a prompt to a model of this configuration, or None."""
        value = self._cache.get(digest(prompt, llm_string))
        if value is None:
            return None
        try:
            return [_read(stored) for stored in from_json(value)]
        except (ValueError, KeyError, TypeError) as exc:
            logger.warning("an answer that was kept for LangChain cannot be read, and is made again: %r", exc)
            return None

    def update(self, prompt: str, llm_string: str, return_val: Sequence[Generation]) -> None:
        """Keep an answer, if JSON can say it."""
        if any(map(_is_degraded, return_val)):
            return
        try:
            value = to_json([_written(generation) for generation in return_val])
        except ValueError as exc:
            logger.warning("an answer is not kept, for JSON cannot say it: %s", exc)
            return
        self._cache.set(digest(prompt, llm_string), value, self._ttl_s)

    def clear(self, **kwargs: Any) -> None:
        """Make all of the namespace void, in every process."""
        self._cache.invalidate()

    @property
    def _cache(self) -> Cache:
        return cluster_of(self._sender.app).caches.namespace(self._namespace, tenant=self._tenant)


def _is_degraded(generation: Generation) -> bool:
    return isinstance(generation, ChatGeneration) and bool(generation.message.response_metadata.get("degraded"))


# Not by LangChain's ``dumps`` and ``loads``: those make whatever class the stored text names.


def _written(generation: Generation) -> dict[str, Any]:
    written: dict[str, Any] = {"generation_info": generation.generation_info}
    if isinstance(generation, ChatGeneration):
        return written | {"message": message_to_dict(generation.message)}
    return written | {"text": generation.text}


def _read(stored: Mapping[str, Any]) -> Generation:
    info = stored["generation_info"]
    if "message" in stored:
        (message,) = messages_from_dict([stored["message"]])
        return ChatGeneration(message=message, generation_info=info)
    return Generation(text=stored["text"], generation_info=info)
