"""Every error that this package raises, as one tree under ``ClusterError``.

Adapters turn foreign errors into these at their edge, so a caller needs to know no client library.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

from kombu.exceptions import EncodeError


class ClusterError(Exception):
    """Base of all errors of this package."""


class ConfigurationError(ClusterError, ValueError):
    """A setting is unknown or has a value that cannot work."""


class InvalidArguments(ClusterError, ValueError):
    """The arguments of a job were refused before it was sent; the message names the field."""


# Subclasses of Kombu's, for Celery fails a job by it whose next step cannot be sent.
class PayloadTooLarge(ClusterError, EncodeError):
    """A job was refused before it was sent, or failed: its message, or its result, is over the limit.

    Arguments and results of that size are to be stored elsewhere.
    """


class InvalidQueue(ClusterError, EncodeError):
    """A job was refused before it was sent: the name of its queue is none that jobs can be in."""


class PartlySubmitted(ClusterError):
    """Some of the jobs that were submitted together were sent, ``results`` are theirs; then something went wrong."""

    def __init__(self, message: str, results: Sequence[Any]) -> None:
        super().__init__(message, results)
        self.results = results

    def __str__(self) -> str:
        return str(self.args[0])


class NoNodeAvailable(ClusterError):
    """A balancer was given no node to choose from."""


class NodeNotFound(ClusterError, LookupError):
    """No node of that id is registered."""

    def __init__(self, node_id: str, known: Iterable[str] = ()) -> None:
        super().__init__(f"no node {node_id!r} is registered{did_you_mean(node_id, known)}")
        self.node_id = node_id


class JobNotFound(ClusterError, LookupError):
    """No job of that id is in quarantine."""

    def __init__(self, job_id: str, known: Iterable[str] = ()) -> None:
        super().__init__(f"no job {job_id!r} is in quarantine{did_you_mean(job_id, known)}")
        self.job_id = job_id


class NodeNameTaken(ClusterError):
    """A living node has this id already."""


class UnavailableError(ClusterError):
    """A service that the cluster leans on did not answer."""


class BrokerUnavailable(UnavailableError):
    """Redis as broker did not answer."""


class RegistryUnavailable(UnavailableError):
    """The service registry did not answer."""


class LocksUnavailable(UnavailableError):
    """The service that holds the locks did not answer."""


class CacheUnavailable(UnavailableError):
    """The cache did not answer, lately at least."""


class StoreUnavailable(UnavailableError):
    """The document store could not be read or written."""


class FencedError(ClusterError):
    """The epoch of this node was ended by others: it must not start, commit or acknowledge anything."""

    def __init__(self, node_id: str, epoch: str) -> None:
        super().__init__(f"node {node_id} was fenced: its epoch {epoch} has ended")
        self.node_id, self.epoch = node_id, epoch

    def __reduce__(self) -> tuple[type[FencedError], tuple[str, str]]:
        return type(self), (self.node_id, self.epoch)


class LockTaken(ClusterError):
    """Another holds the lock, and did for as long as was waited."""

    def __init__(self, name: str, waited_s: float) -> None:
        super().__init__(name, waited_s)
        self.name, self.waited_s = name, waited_s

    def __str__(self) -> str:
        return f"lock {self.name!r} is held by another" + (f", waited {self.waited_s:g} s" if self.waited_s else "")


class LockLost(ClusterError):
    """The time of a lock ran out, and another may hold it: what it protects must not be written any more."""

    def __init__(self, name: str, token: int) -> None:
        super().__init__(name, token)
        self.name, self.token = name, token

    def __str__(self) -> str:
        return f"lock {self.name!r} is lost: token {self.token} holds it no more"


class StaleCommit(ClusterError):
    """A result was refused: another delivery of the job, or another node, has ended it."""


class EndNotStored(BrokerUnavailable):
    """Redis did not answer when a job had ended: the job is delivered again."""


class StreamAbandoned(ClusterError):
    """A job that streams its text was ended, as its caller had asked for, because nobody reads it any more."""


class StreamRestarted(ClusterError):
    """The text that was read so far is void, for the job was begun again: now it is read from its beginning."""


class NodeLost(ClusterError):
    """The job's node or process died while it ran, and it declares ``rerun_on_crash=False``."""


class QuarantinedError(ClusterError):
    """The job is not run any more: too many processes died while it ran."""


class OutOfMemory(ClusterError):
    """The job failed with a MemoryError, which Celery would take for one of the worker itself."""


class ProviderError(ClusterError):
    """A backend of language models or embeddings refused or failed a request."""


class ProviderUnavailable(ProviderError):
    """A provider did not answer, or kept answering with errors that may pass."""


class _NotAsked(ProviderUnavailable):
    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        # Both are arguments of the exception: so it comes out of a result, or a pickle, as it went in.
        super().__init__(message, retry_after_s)
        self.retry_after_s = retry_after_s
        """When to ask again, in seconds from now."""

    def __str__(self) -> str:
        return str(self.args[0])


class CircuitOpen(_NotAsked):
    """A provider was not asked, because it failed too often; any node may have seen that."""


class ProviderLimited(_NotAsked):
    """A provider was not asked, because the cluster has used up what its limits allow for now."""


class StaleWriter(ClusterError):
    """Another has taken the turn of this writer in a shard, and has written: what it would write now is out of date.

    Tokens of locks in another service are other numbers: after a change of the registry, splitting a collection makes
    its rows anyone's again.
    """

    def __init__(self, table: str, token: int, rows: int) -> None:
        super().__init__(table, token, rows)
        self.table, self.token, self.rows = table, token, rows

    def __str__(self) -> str:
        return f"{self.table}: {self.rows} rows were written by holders of its lock that came after token {self.token}"


class BeingSplit(StoreUnavailable):
    """A collection cannot be written to for now: its documents are being divided anew."""


class CollectionNotFound(ClusterError, LookupError):
    """No collection of that name exists."""


class ShardNotFound(ClusterError, LookupError):
    """No shard of that name is assigned to nodes."""


class SearchIncomplete(ClusterError):
    """Some shards were not searched in time, and a partial result was not asked for."""


class LayoutChanged(ClusterError):
    """A collection is not divided into shards as the caller takes for granted: its layout is to be read again."""


class CollectionMismatch(ClusterError, ValueError):
    """Vectors do not fit the collection: another embedding model or another dimension."""


class UnreadableFile(ClusterError, ValueError):
    """A file holds no text that could be indexed; the message says why."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest of ``known``, or nothing."""
    nearest = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""
