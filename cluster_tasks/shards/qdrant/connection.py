"""A Qdrant that is asked: a server, or one in this process; and its errors, turned into ours."""

from __future__ import annotations

import os
import pickle
import sqlite3
import ssl
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from threading import Lock
from typing import Any, TypeVar

from qdrant_client import QdrantClient
from qdrant_client.common.client_exceptions import QdrantException
from qdrant_client.http.exceptions import ApiException, UnexpectedResponse

from cluster_tasks.addresses.qdrant import QdrantUrl
from cluster_tasks.errors import ClusterError, CollectionNotFound, ConfigurationError, StoreUnavailable

TIMEOUT_S = 30
"""For one request; none of ours moves more than some megabytes."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Opened:
    process: int
    client: QdrantClient


class Connection:
    """What of a Qdrant is ours. Threads may share one, and it may be made before a fork.

    A child of a process that has used a server opens connections of its own; one of a process that has used a folder is
    refused with StoreUnavailable. Making one does no I/O.
    """

    def __init__(self, address: QdrantUrl) -> None:
        self.address = address
        self._opened: _Opened | None = None
        self._opening = Lock()
        # What runs in this process is not made for threads.
        self._turn: AbstractContextManager[Any] = Lock() if address.folder else nullcontext()

    def named(self, collection: str) -> str:
        """Return the name of a collection in Qdrant. No prefix, and no collection, has a dot in it."""
        return f"{self.address.prefix}.{collection}"

    def ask(self, what: str, request: Callable[[QdrantClient], T]) -> T:
        """Return what ``request`` does; ``what`` is the collection, or another object, that it is about.

        Raises StoreUnavailable if Qdrant does not answer or cannot do it, CollectionNotFound if it says that there is
        none, ConfigurationError for a wrong key or a folder that another process has.
        """
        with foreign_errors(f"{self.address}: {what}"), self._turn:
            return request(self._client())

    def close(self) -> None:
        """Close the connections of this process, and give up the folder. Safe to repeat."""
        with self._opening:
            opened, self._opened = self._opened, None
        if opened is not None and opened.process == os.getpid():
            opened.client.close()

    def _client(self) -> QdrantClient:
        opened = self._opened
        if opened is None or opened.process != os.getpid():
            with self._opening:
                opened = self._opened = self._opened_here()
        return opened.client

    def _opened_here(self) -> _Opened:
        if self._opened is not None and self._opened.process == os.getpid():
            return self._opened
        if self._opened is not None and self.address.folder:
            raise StoreUnavailable("the store was used before this process was forked; use it in the child only")
        return _Opened(os.getpid(), _open(self.address))


def _open(address: QdrantUrl) -> QdrantClient:
    if address.folder:
        # One thread at a time comes here, but not always the same.
        return QdrantClient(path=address.folder, force_disable_check_same_thread=True)
    options: dict[str, Any] = {}
    if address.ca:
        try:
            options["verify"] = ssl.create_default_context(cafile=address.ca)
        except OSError as exc:
            raise ConfigurationError(f"qdrant:// URL: ca={address.ca!r} cannot be read: {exc}") from None
    if key := address.key.get_secret_value():
        # As a header: of a key the client says that it needs TLS, also where a network is trusted.
        options["headers"] = {"api-key": key}
    url = f"http{'s' * address.tls}://{address.host}:{address.port}"
    # Comparing versions is a request of its own, when the client is made.
    return QdrantClient(url=url, timeout=TIMEOUT_S, check_compatibility=False, **options)


@contextmanager
def foreign_errors(what: str) -> Iterator[None]:
    """Turn the errors of Qdrant's client, and Python's own that its local mode raises, into ours."""
    try:
        yield
    except ClusterError:
        raise
    except UnexpectedResponse as exc:
        raise _refusal(what, exc.status_code or 0, exc.content) from exc
    except (ApiException, QdrantException) as exc:
        # What went wrong below it has no words of its own there.
        raise StoreUnavailable(f"{what}: {getattr(exc, 'source', exc)!r}") from exc
    except (OSError, RuntimeError, ValueError, EOFError, sqlite3.Error, pickle.PickleError) as exc:
        if "already accessed by another instance" in str(exc):
            raise ConfigurationError(
                f"{what}: another process, or another store in this one, has this folder; without a server Qdrant is "
                "for one process: start a server, and name it in CLUSTER_VECTOR_URL (qdrant://HOST)"
            ) from exc
        if isinstance(exc, ValueError) and "not found" in str(exc):
            raise CollectionNotFound(f"{what}: there is none") from exc
        raise StoreUnavailable(f"{what}: {exc}") from exc


def _refusal(what: str, status: int, content: bytes) -> ClusterError:
    words = f"{what}: Qdrant answers {status}: {content[:500].decode(errors='replace')}"
    if status in (401, 403):
        return ConfigurationError(f"{words}: is the key in CLUSTER_VECTOR_URL (qdrants://:APIKEY@HOST) right?")
    return CollectionNotFound(words) if status == 404 else StoreUnavailable(words)
