"""What the ready-made jobs keep in the cache, so that nobody computes it again, and how it is found.

Nothing is kept without ``cluster_cache_url``. What identifies a value is hashed: keys tell nothing of texts, and all
values are as the provider of the settings made them. No numpy here: processes that only send jobs look here first.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from celery import Celery

from cluster_tasks.addresses.secret import SecretUrl
from cluster_tasks.cache import Cache, Caches, Entry, Refresh
from cluster_tasks.cache.forks import renewed_after_fork
from cluster_tasks.errors import CacheUnavailable
from cluster_tasks.settings import ClusterSettings
from cluster_tasks.tasks.apps import Configured, cluster_of
from cluster_tasks.tasks.arguments import CacheUse
from cluster_tasks.tasks.reranking import is_degraded

logger = logging.getLogger(__name__)

PAID_AGAIN_S = 1.0
LASTING_ENDS = ("stop", "tool_calls")
"""Finish reasons of answers that are kept: others were cut short."""


Ticket = tuple[str, str | None]
"""The key of a search, and the generation of its namespace before it began; None: not known, so nothing is kept."""


class Embedded(NamedTuple):
    """The vector of a text, and what made it."""

    model: str
    provider: str
    vector: bytes
    """Little-endian float32."""

    @classmethod
    def read(cls, value: bytes) -> Embedded:
        """Read what ``written`` wrote."""
        head, _, vector = value.partition(b"\n")
        model, provider = json.loads(head)
        return cls(model, provider, vector)

    def written(self) -> bytes:
        """Return it as a value of the cache."""
        return json.dumps([self.model, self.provider]).encode() + b"\n" + self.vector


class Kept:
    """The kept values of one app."""

    def __init__(self, settings: ClusterSettings, caches: Caches) -> None:
        self._settings, self._caches = settings, caches
        self._owed: dict[str, int] = {}
        """Collections whose searches are void, which the cache could not be told yet, and how often they became so."""
        self.after_fork()
        renewed_after_fork(self)

    def after_fork(self) -> None:
        """Begin in a child without the locks and timers of the parent."""
        self._lock = threading.Lock()
        self._payer: threading.Timer | None = None

    # Embeddings: each text by itself.

    def find_vectors(self, texts: Iterable[str], model: str | None) -> dict[str, Embedded]:
        """Return what is known of texts."""
        keys = {text: self._vector_key(text, model) for text in texts}
        found = self._embeddings.get_many(set(keys.values()))
        return {text: Embedded.read(found[key]) for text, key in keys.items() if key in found}

    def vectors(
        self, texts: Iterable[str], model: str | None, embed: Callable[[list[str]], dict[str, Embedded]]
    ) -> dict[str, Embedded]:
        """Return the vectors of texts; ``embed`` makes those that are not known and that nobody else makes just now."""
        text_of = {self._vector_key(text, model): text for text in texts}

        def compute(keys: list[str]) -> dict[str, bytes]:
            made = embed([text_of[key] for key in keys])
            return {key: made[text_of[key]].written() for key in keys}

        found = self._embeddings.get_or_compute_many(text_of, compute, self._settings.cache_ttl_s)
        return {text_of[key]: Embedded.read(value) for key, value in found.items()}

    def keep_vectors(self, vectors: Mapping[str, Embedded], model: str | None) -> None:
        """Keep the vectors of texts in place of those that were kept before, which all processes forget."""
        values = {self._vector_key(text, model): made.written() for text, made in vectors.items()}
        self._embeddings.write(values, self._settings.cache_ttl_s)

    @property
    def _embeddings(self) -> Cache:
        return self._caches.namespace("embeddings")

    def _vector_key(self, text: str, model: str | None) -> str:
        settings = self._settings
        return digest(_place(settings.embedding_base_url), model or settings.embedding_model, text)

    # Searches: void as soon as their collection changes.

    def search(self, collection: str, asked: Sequence[Any], compute: Callable[[], Any], use: CacheUse) -> Any:
        """Return what ``compute`` returns for what is ``asked`` of a collection, which JSON can say.

        What was to be ranked by a model, and was not, is not kept.
        """
        self._pay(collection)
        key = self._search_key(asked)
        if use != "refresh" and (found := self._searches(collection).get_json(key)) is not None:
            return {**found, "cached": True}

        def make() -> bytes:
            found = compute()
            if is_degraded(found):
                raise _NotKept(found)
            return json.dumps(found).encode()

        refresh = Refresh.NOW if use == "refresh" else Refresh.NEVER
        try:
            made = self._searches(collection).get_or_compute(
                key, make, self._settings.cache_search_ttl_s, refresh=refresh
            )
        except _NotKept as exc:
            return exc.result
        assert made is not None
        return json.loads(made)

    def look_for_search(self, collection: str, asked: Sequence[Any]) -> tuple[Any, Ticket]:
        """Return what is kept for what is ``asked``, or None, and what ``keep_search`` needs to keep it."""
        self._pay(collection)
        key = self._search_key(asked)
        reading = self._searches(collection).read([key])
        entry, ticket = reading.entries.get(key), (key, reading.generation)
        if entry is None or entry.value is None or not entry.is_fresh:
            return None, ticket
        return {**json.loads(entry.value), "cached": True}, ticket

    def keep_search(self, collection: str, ticket: Ticket, found: Any) -> None:
        """Keep what was found since ``ticket`` was given, unless the collection has changed since then."""
        key, generation = ticket
        if generation is None or collection in self._owed:
            return
        value, ttl_s = json.dumps(found).encode(), self._settings.cache_search_ttl_s
        self._searches(collection).write({key: value}, ttl_s, generation=generation, replaces=False)

    def find_search(self, collection: str, asked: Sequence[Any]) -> Any:
        """Return what is kept for what is ``asked`` of a collection, or None."""
        if collection in self._owed:
            return None
        found = self._searches(collection).get_json(self._search_key(asked))
        return None if found is None else {**found, "cached": True}

    def forget_searches(self, collection: str) -> None:
        """Make the kept searches of a collection void, now or, while the cache is away, as soon as it is back."""
        with self._lock:
            self._owed[collection] = self._owed.get(collection, 0) + 1
        self._pay(collection)

    def _pay(self, collection: str) -> None:
        """Tell the cache what it is owed. What is owed meanwhile, by another thread, stays so."""
        owed = self._owed.get(collection)
        if owed is None:
            return
        try:
            self._searches(collection).invalidate()
        except CacheUnavailable as exc:
            logger.warning("searches of %s may be served that are up to %g s old: %s", collection,
                           self._settings.cache_search_ttl_s, exc)  # fmt: skip
            self._pay_later()
            return
        with self._lock:
            if self._owed.get(collection) == owed:
                del self._owed[collection]

    def _pay_later(self) -> None:
        with self._lock:
            if self._payer is None:
                self._payer = threading.Timer(PAID_AGAIN_S, self._pay_all)
                self._payer.daemon = True
                self._payer.start()

    def _pay_all(self) -> None:
        with self._lock:
            self._payer = None
        for collection in list(self._owed):
            self._pay(collection)

    def _searches(self, collection: str) -> Cache:
        # Who has added a document finds it: the generation is read with every search.
        return self._caches.namespace(f"search.{collection}", staleness_s=0.0)

    def _search_key(self, asked: Sequence[Any]) -> str:
        settings = self._settings
        embedding = _place(settings.embedding_base_url), settings.embedding_model
        return digest(*embedding, _place(settings.rerank_base_url), settings.rerank_model, *asked)

    # Answers.

    @staticmethod
    def keeps_answer(temperature: float | None, use: CacheUse) -> bool:
        """Whether an answer is kept: one that would be the same again, or one whose caller asks for that."""
        return use is not False and (temperature == 0 or use is not None)

    def answer(
        self, request: Mapping[str, Any], compute: Callable[[Callable[[], Any]], Any], use: CacheUse,
        *, is_shared: bool = True, among: str = "",
    ) -> dict[str, Any]:  # fmt: skip
        """Return the answer to a request, which JSON can say.

        ``compute`` makes it; it is handed what returns a stale answer, or None, for when no model is available. One
        that is not ``is_shared`` is made here even while another is being made, and what ends it ends no other. One
        that is not kept, or an error, is given to callers of the same ``among`` only.
        """
        key, answers = self._answer_key(request), self._answers
        if use != "refresh" and (found := self.find_answer(request)) is not None:
            return found

        def make() -> bytes:
            made: dict[str, Any] = compute(lambda: _answer(answers.read([key]).entries.get(key)))
            if made["degraded"] or made["finish_reason"] not in LASTING_ENDS:
                raise _NotKept(made)
            return json.dumps(made).encode()

        refresh = Refresh.NOW if use == "refresh" or not is_shared else Refresh.NEVER
        try:
            made = answers.get_or_compute(
                key, make, self._settings.cache_ttl_s, refresh=refresh, kept_s=self._settings.cache_kept_s, among=among
            )
        except _NotKept as exc:
            return exc.result
        assert made is not None
        answer: dict[str, Any] = json.loads(made)
        return answer

    def find_answer(self, request: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the fresh answer that is kept for a request, or None."""
        key = self._answer_key(request)
        entry = self._answers.read([key]).entries.get(key)
        return _answer(entry) if entry is not None and entry.is_fresh else None

    @property
    def _answers(self) -> Cache:
        return self._caches.namespace("answers")

    def _answer_key(self, request: Mapping[str, Any]) -> str:
        asked = {**request, "model": request.get("model") or self._settings.llm_model}
        return digest(_place(self._settings.llm_base_url), asked)


class _NotKept(Exception):
    """Leaves a computation with an answer for all who wait for it, and nobody else."""

    def __init__(self, result: dict[str, Any]) -> None:
        self.result = result


_kept: WeakKeyDictionary[Celery, Kept] = WeakKeyDictionary()


def kept_of(app: Celery) -> Kept | None:
    """Return what the jobs of an app keep; None: nothing. Raises ClusterError, ConfigurationError."""
    if (kept := _kept.get(app)) is not None:
        return kept
    cluster: Configured = cluster_of(app)
    if cluster.settings.cache_url is None:
        return None
    return _kept.setdefault(app, Kept(cluster.settings, cluster.caches))


def digest(*parts: Any) -> str:
    """Return 64 characters that stand for values which JSON can say; equal ones for equal values."""
    said = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(said.encode(errors="surrogatepass")).hexdigest()


def _answer(entry: Entry | None) -> dict[str, Any] | None:
    if entry is None or entry.value is None:
        return None
    return {**json.loads(entry.value), "cached": True, "age_s": round(entry.age_s, 3)}


def _place(url: SecretUrl | None) -> str:
    return url.get_secret_value() if url is not None else ""
