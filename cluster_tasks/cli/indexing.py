"""A collection is brought in line with a folder, by jobs of which only a few are under way at a time.

Nothing is remembered but what the collection holds: a passage carries the digest of its file. So a run that was
interrupted, on whatever side, is completed by the next, and a run that finds nothing new changes nothing.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from celery.backends.asynchronous import E_RETRY_LIMIT_EXCEEDED
from celery.result import AsyncResult

from cluster_tasks.errors import (
    BrokerUnavailable,
    ClusterError,
    CollectionMismatch,
    CollectionNotFound,
    ConfigurationError,
    InvalidArguments,
    PayloadTooLarge,
    ProviderError,
    ProviderUnavailable,
    UnreadableFile,
)
from cluster_tasks.shards.ingest.files import Found, Selection, find, read_bytes
from cluster_tasks.shards.ingest.readers import Format, read
from cluster_tasks.shards.ingest.splitting import MAX_WHOLE_ID, Split
from cluster_tasks.tasks.arguments import MAX_LISTED, OPTIMIZE_WITHIN_S

IN_FLIGHT = 8
"""Jobs under way at a time: enough for several nodes, few enough to be stopped."""
BATCH_CHARACTERS = 1_000_000
"""A job of several files holds no more text."""
REMOVED_AT_ONCE = 500
FAILED_IN_A_ROW = 5
"""After so many failed jobs the next would fail, too."""
READING = 1
"""Raised when the same file is read as another text: then all are indexed anew."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be indexed, and how."""

    folder: Path
    collection: str
    name: str
    """Of the folder in the collection, which may hold several."""
    selection: Selection
    split: Split
    batch: int
    """The most files of one job."""


@dataclass(slots=True)
class Report:
    """What came of the files, by their paths in the folder."""

    files: int = 0
    indexed: list[str] = field(default_factory=list)
    passages: int = 0
    """Of the files that were indexed."""
    unchanged: int = 0
    removed: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    """Path → why there is nothing in it to index."""
    failed: dict[str, str] = field(default_factory=dict)
    """Path → what went wrong; the next run tries again."""
    stopped: str = ""
    """Why the run gave up before its end."""

    @property
    def done(self) -> int:
        """How many files need no more of this run."""
        return len(self.indexed) + self.unchanged + len(self.skipped) + len(self.failed)


@dataclass(frozen=True, slots=True)
class _File:
    path: str
    document: dict[str, Any]
    written: Format

    @property
    def size(self) -> int:
        return len(self.document["text"])


class _GaveUp(Exception):
    """Further jobs would fail as the last ones did."""


class Indexing:
    """One run. ``jobs`` are the tasks of an app in a cluster, by name; ``progress`` is told after every step."""

    def __init__(self, jobs: Mapping[str, Any], plan: Plan, progress: Callable[[Report], None]) -> None:
        self._add = jobs["retrieval.add_documents"]
        self._delete, self._list = jobs["retrieval.delete_documents"], jobs["retrieval.list_documents"]
        self._optimize = jobs["retrieval.optimize"]
        self._plan, self._progress = plan, progress
        self.report = Report()
        self._under_way: deque[tuple[Sequence[_File], AsyncResult]] = deque()
        self._single: list[_File] = []
        """Files of jobs that failed, each to be tried by itself."""
        self._failed_in_a_row = 0

    def run(self) -> None:
        """Index what is new or changed, then remove what is gone; ``report`` tells what came of it.

        What has changed is then compacted, by a job of its own.

        Raises ClusterError if the collection cannot be listed, and what the broker raises. Interrupted, it takes back
        the jobs that have not begun.
        """
        plan, report = self._plan, self.report
        found = find(plan.folder, plan.selection)
        report.files = len(found.paths) + len(found.skipped) + len(found.failed)
        report.skipped |= found.skipped
        report.failed |= found.failed
        held = self._held()
        self._progress(report)
        try:
            for batch in self._batches(self._changed(found, held)):
                self._send(batch)
            self._settle_all()
            for file in self._single:
                self._send([file])
            self._settle_all()
        except _GaveUp as exc:
            report.stopped = str(exc)
            self._take_back()
        except KeyboardInterrupt:
            self._take_back()
            raise
        else:
            self._remove(found, held)
        if report.indexed or report.removed:
            # Until then each search scans what was added for its words. Nobody waits for it.
            self._optimize.apply_async((plan.collection,), expires=OPTIMIZE_WITHIN_S, ignore_result=True)

    # What the collection holds.

    def _held(self) -> dict[str, str]:
        """Return path → digest of the files of the folder that the collection holds; an empty one: not all of it."""
        held: dict[str, str] = {}
        after: str | None = ""
        while after is not None:
            job = self._list.delay(
                self._plan.collection, where={"folder": self._plan.name}, after=after, limit=MAX_LISTED
            )
            page = _result_of(job)
            if isinstance(page, CollectionNotFound):
                break
            if isinstance(page, Exception):
                raise page if isinstance(page, ClusterError) else ClusterError(_words(page))
            for document in page["documents"]:
                path, digest = (str(document["metadata"].get(key, "")) for key in ("source", "digest"))
                # Others may have documents with such metadata.
                if document["id"] == self._document_id(path):
                    held[path] = digest if document["complete"] else ""
            after = page["next"]
        return held

    def _remove(self, found: Found, held: Mapping[str, str]) -> None:
        """Delete the documents of files that are gone or hold no text any more, as far as this run looks at such."""
        there = {*found.paths, *found.failed} - self.report.skipped.keys()
        # Below a folder that could not be listed everything seems to be gone.
        gone = [
            path
            for path in held
            if path not in there and self._plan.selection.includes(path) and not _is_below(path, found.failed)
        ]
        for start in range(0, len(gone), REMOVED_AT_ONCE):
            some = gone[start : start + REMOVED_AT_ONCE]
            deleted = self._delete.delay(self._plan.collection, ids=[self._document_id(path) for path in some])
            if isinstance(error := _result_of(deleted), Exception):
                self.report.failed |= dict.fromkeys(some, f"is gone, but not from the collection: {_words(error)}")
            else:
                self.report.removed += some

    # What is new.

    def _changed(self, found: Found, held: Mapping[str, str]) -> Iterator[_File]:
        report = self.report
        for path in found.paths:
            try:
                data = read_bytes(self._plan.folder / path)
                digest = self._digest(data)
                if held.get(path) == digest:
                    report.unchanged += 1
                else:
                    text, written = read(path, data)
                    metadata = {"folder": self._plan.name, "source": path, "digest": digest}
                    document = {"id": self._document_id(path), "text": text, "metadata": metadata}
                    yield _File(path, document, written)
            except UnreadableFile as exc:
                report.skipped[path] = str(exc)
            except ConfigurationError as exc:
                report.failed[path] = str(exc)
            except OSError as exc:
                report.failed[path] = f"cannot be read: {exc.strerror}"
            self._progress(report)

    def _digest(self, data: bytes) -> str:
        split = self._plan.split
        how = f"{READING}:{split.size}:{split.repeated}:{split.unit}\0"
        return hashlib.blake2b(how.encode() + data, digest_size=16).hexdigest()

    def _document_id(self, path: str) -> str:
        whole = f"{self._plan.name}/{path}"
        return whole if len(whole) <= MAX_WHOLE_ID else hashlib.blake2b(whole.encode(), digest_size=16).hexdigest()

    def _batches(self, files: Iterator[_File]) -> Iterator[Sequence[_File]]:
        """Put together the files that are split alike. At most one batch of each kind is open."""
        open_batches: dict[Format, list[_File]] = {}
        for file in files:
            batch = open_batches.setdefault(file.written, [])
            if batch and sum(each.size for each in batch) + file.size > BATCH_CHARACTERS:
                yield batch
                batch = open_batches[file.written] = []
            batch.append(file)
            if len(batch) == self._plan.batch:
                yield open_batches.pop(file.written)
        yield from open_batches.values()

    # Jobs.

    def _send(self, batch: Sequence[_File]) -> None:
        while len(self._under_way) >= IN_FLIGHT:
            self._settle()
        split = self._plan.split.model_copy(update={"format": batch[0].written}).model_dump(mode="json")
        try:
            job = self._add.delay(self._plan.collection, [file.document for file in batch], split=split)
        except (InvalidArguments, PayloadTooLarge) as exc:
            self._has_failed(batch, exc)
        else:
            self._under_way.append((batch, job))

    def _settle_all(self) -> None:
        while self._under_way:
            self._settle()

    def _settle(self) -> None:
        batch, job = self._under_way[0]
        result = _result_of(job)
        self._under_way.popleft()
        if isinstance(result, Exception):
            self._has_failed(batch, result)
        else:
            self._failed_in_a_row = 0
            self.report.indexed += [file.path for file in batch]
            self.report.passages += result["passages"]
        self._progress(self.report)

    def _has_failed(self, batch: Sequence[_File], error: Exception) -> None:
        if len(batch) > 1 and _may_be_of_one(error):
            self._single += batch
            return
        for file in batch:
            too_large = isinstance(error, PayloadTooLarge)
            (self.report.skipped if too_large else self.report.failed)[file.path] = _words(error)
        self._failed_in_a_row += not isinstance(error, InvalidArguments | PayloadTooLarge)
        if isinstance(error, CollectionMismatch | ConfigurationError) or self._failed_in_a_row == FAILED_IN_A_ROW:
            raise _GaveUp(_words(error))

    def _take_back(self) -> None:
        """Revoke the jobs under way: after a change they could bring back what the next run has replaced."""
        for _, job in self._under_way:
            job.revoke()
        self._under_way.clear()


def _result_of(job: AsyncResult) -> Any:
    """Wait for the result of a job, or the exception that it failed with. Raises BrokerUnavailable."""
    try:
        return job.get(propagate=False)
    except RuntimeError as exc:
        # Celery has tried to connect again for a while.
        if exc.args != (E_RETRY_LIMIT_EXCEEDED,):
            raise
        raise BrokerUnavailable(f"waiting for a result: {exc.__cause__}") from exc


def _may_be_of_one(error: Exception) -> bool:
    """Whether one text may be the reason why a job failed that had several."""
    if isinstance(error, ProviderError):
        return not isinstance(error, ProviderUnavailable)
    return isinstance(error, InvalidArguments | PayloadTooLarge)


def _is_below(path: str, folders: Mapping[str, str]) -> bool:
    return any(folder == "." or path.startswith(f"{folder}/") for folder in folders)


def _words(error: Exception) -> str:
    return f"{error}" if isinstance(error, ClusterError) and str(error) else f"{type(error).__name__}: {error}"
