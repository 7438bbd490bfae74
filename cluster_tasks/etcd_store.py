"""Everything that is the same for each use of etcd: addresses, transactions, leases, streams, errors.

Requests go to etcd's JSON gateway by ``etcd3gw``; etcd 3.4 is the oldest that serves it below ``/v3/``.
"""

from __future__ import annotations

import base64
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Any, NoReturn, TypeVar

import requests
from etcd3gw import Etcd3Client
from etcd3gw.exceptions import ConnectionFailedError, ConnectionTimeoutError, Etcd3Exception
from requests.adapters import HTTPAdapter

from cluster_tasks.addresses.etcd import EtcdUrl
from cluster_tasks.errors import UnavailableError

TIMEOUT_S = 3.0
"""For an answer of one server. A leader is elected in less, and the others wait for it."""
SILENCE_S = 5.0
"""A stream that brings nothing for so long is ended, to be opened anew: one whose server has died, or was cut off from
the others, is silent, too."""
CONNECTIONS_KEPT = 32
LINES_KEPT = 1_000
CHUNK = 65_536
API_PATH = "/v3/"
PASSING = (ConnectionFailedError, ConnectionTimeoutError, requests.RequestException)
"""Errors of one server: another may answer."""
TOKEN_IS_STALE = (
    "etcdserver: invalid auth token", "etcdserver: user name is empty", "etcdserver: revision of auth store is old",
)  # fmt: skip
"""A token lives for minutes, and no restart of its server."""
Operation = Mapping[str, Any]
T = TypeVar("T")


class LeaseExpired(Exception):
    """A key was to be put under a lease that is there no more."""


@dataclass(frozen=True, slots=True)
class KeyValue:
    """A key as etcd holds it."""

    key: str
    value: str
    created: int
    """The revision that made it."""
    modified: int
    """The revision that changed it last, or deleted it."""
    lease: int
    """0: none."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a transaction has done."""

    succeeded: bool
    revision: int
    """Of the store, after it."""
    found: Sequence[Sequence[KeyValue]]
    """The keys of each read, in the order of the reads."""


def unchanged(key: str, revision: int) -> Operation:
    """Compare: ``key`` was changed last by ``revision``; 0: it does not exist."""
    return {"key": _encoded(key), "target": "MOD", "result": "EQUAL", "mod_revision": revision}


def read(key: str, end: str = "", *, keys_only: bool = False) -> Operation:
    """Read one key, or all from ``key`` up to and without ``end``."""
    return {"request_range": {"key": _encoded(key), "range_end": _encoded(end), "keys_only": keys_only}}


def put(key: str, value: str, lease: int | None = None) -> Operation:
    """Write a key under a lease; None: it exists, and stays under the lease that it has."""
    attached = {"ignore_lease": True} if lease is None else {"lease": lease}
    return {"request_put": {"key": _encoded(key), "value": _encoded(value), **attached}}


def put_if_missing(key: str, value: str) -> Operation:
    """Write a key that does not exist, under no lease."""
    return {"request_txn": {"compare": [unchanged(key, 0)], "success": [put(key, value, lease=0)]}}


def delete(key: str, end: str = "") -> Operation:
    """Delete one key, or all from ``key`` up to and without ``end``."""
    return {"request_delete_range": {"key": _encoded(key), "range_end": _encoded(end)}}


class EtcdStore:
    """One etcd, of one server or several. Does no I/O until it is asked.

    Every method tries each server once, raises the ``unavailable`` that it was made with if none answers or etcd
    refuses, may be called from several threads and, after a fork, from both processes. A request whose answer was
    lost may have been done, and be done again by the next server: transactions must bear it.
    """

    def __init__(self, address: EtcdUrl, unavailable: type[UnavailableError]) -> None:
        self._address, self._unavailable = address, unavailable
        self._token: str | None = None
        self._current = 0
        # By process, since a connection serves one. What was made before a fork is kept and never touched again:
        # its pool may have been locked by a thread that the child does not have.
        self._clients: dict[int, Sequence[Etcd3Client]] = {}

    def commit(self, compare: Sequence[Operation], then: Sequence[Operation], doing: str) -> Reply:
        """Do ``then`` in one step if all of ``compare`` holds. Raises LeaseExpired."""
        answer = self._post("kv/txn", {"compare": compare, "success": then}, doing)
        ranges = [each["response_range"] for each in answer.get("responses", ()) if "response_range" in each]
        return Reply(
            succeeded=answer.get("succeeded", False),
            revision=int(answer["header"]["revision"]),
            found=[[key_value(each) for each in found.get("kvs", ())] for found in ranges],
        )

    def grant(self, ttl_s: int) -> int:
        """Return a new lease that ends after ``ttl_s`` unless it is kept alive."""
        return int(self._post("lease/grant", {"TTL": ttl_s, "ID": 0}, "opening a lease")["ID"])

    def keep_alive(self, lease: int) -> bool:
        """Begin the time of a lease anew; return whether it was still there."""
        answer = self._post("lease/keepalive", {"ID": lease}, "keeping a lease alive")
        return int(answer["result"].get("TTL", 0)) > 0

    def revoke(self, lease: int) -> bool:
        """End a lease and delete the keys under it; return whether it was still there."""
        try:
            self._post("lease/revoke", {"ID": lease}, "ending a lease")
        except LeaseExpired:
            return False
        return True

    def watch(self, first: str, end: str, revision: int, doing: str) -> Stream:
        """Return the changes from ``revision`` on of the keys from ``first`` up to and without ``end``."""
        keys = {"key": _encoded(first), "range_end": _encoded(end)}
        asked: dict[str, Any] = {"create_request": {**keys, "start_revision": revision}}

        def opened(client: Etcd3Client, headers: Mapping[str, str]) -> requests.Response:
            response = client.session.post(
                client.get_url("/watch"),
                json=asked,
                headers=headers,
                stream=True,
                timeout=(TIMEOUT_S, SILENCE_S),
            )
            if response.status_code != requests.codes.ok:
                with response:
                    raise Etcd3Exception(response.text, response.reason)
            return response

        return Stream(self._ask(opened, doing))

    def close(self) -> None:
        """Release the connections that are not in use. Safe to repeat, also before first use."""
        for client in self._clients.pop(os.getpid(), ())[:1]:
            client.session.close()

    def refuse(self, reason: str, doing: str, cause: Exception | None = None) -> NoReturn:
        """Raise the error for what etcd says, in words that tell what to do."""
        user = self._address.user
        if "permission denied" in reason.lower():
            reason = f"permission denied: user {user!r} must read and write the keys below {self._address.prefix}/"
        elif "user name is empty" in reason:
            reason = "etcd wants a user, and the URL names none: etcd://USER:PASSWORD@HOST:PORT/PREFIX"
        elif "authentication failed" in reason:
            reason = f"etcd refuses user {user!r} with this password"
        elif "database space exceeded" in reason:
            reason = (
                "etcd is full: compact and defragment it, disarm its alarm, and start it with "
                "--auto-compaction-retention, since every beat is one more revision"
            )
        raise self._unavailable(f"{doing}: {reason}") from cause

    def _post(self, path: str, body: Mapping[str, Any], doing: str) -> Mapping[str, Any]:
        return self._ask(lambda client, headers: _posted(client, path, body, headers), doing)

    def _ask(self, ask: Callable[[Etcd3Client, Mapping[str, str]], T], doing: str) -> T:
        with self._foreign_errors(doing):
            token = self._authenticate() if self._address.user and self._token is None else self._token
            try:
                return self._of_any_server(lambda client: ask(client, _headers(token)))
            except Etcd3Exception as exc:
                if not self._address.user or _reason(exc) not in TOKEN_IS_STALE:
                    raise
            token = self._authenticate()
            return self._of_any_server(lambda client: ask(client, _headers(token)))

    def _of_any_server(self, ask: Callable[[Etcd3Client], T]) -> T:
        clients, first = self._clients_of_this_process(), self._current
        for index in (first + step for step in range(len(clients))):
            try:
                return ask(clients[index % len(clients)])
            except PASSING:
                self._current = (index + 1) % len(clients)
                if index == first + len(clients) - 1:
                    raise
        raise AssertionError("an address names a server")

    def _authenticate(self) -> str:
        body = {"name": self._address.user, "password": self._address.password.get_secret_value()}
        try:
            self._token = self._of_any_server(lambda client: _posted(client, "auth/authenticate", body, {}))["token"]
        except Etcd3Exception as exc:
            if "authentication is not enabled" not in _reason(exc):
                raise
            # Whoever may do everything needs no token.
            self._token = ""
        assert self._token is not None
        return self._token

    def _clients_of_this_process(self) -> Sequence[Etcd3Client]:
        return self._clients.get(os.getpid()) or self._clients.setdefault(os.getpid(), self._connected())

    def _connected(self) -> Sequence[Etcd3Client]:
        address, session = self._address, requests.Session()
        # Neither a proxy nor a netrc of the machine: what the URL says is all.
        session.trust_env = False
        session.mount(f"{address.scheme}://", HTTPAdapter(pool_maxsize=CONNECTIONS_KEPT))
        session.verify = address.ca or True
        if address.cert:
            session.cert = (address.cert, address.key) if address.key else address.cert
        return [
            Etcd3Client(host, port, address.scheme, timeout=TIMEOUT_S, api_path=API_PATH, session=session)
            for host, port in address.servers
        ]

    @contextmanager
    def _foreign_errors(self, doing: str) -> Iterator[None]:
        try:
            yield
        except (Etcd3Exception, requests.RequestException) as exc:
            reason = _reason(exc)
            if "requested lease not found" in reason:
                raise LeaseExpired from exc
            self.refuse(reason, doing, exc)


class Stream:
    """The messages of an answer that does not end. A thread of its own reads them, and holds few that nobody takes."""

    def __init__(self, response: requests.Response) -> None:
        self._response, self._process, self._began_s = response, os.getpid(), time.monotonic()
        self._lines: Queue[bytes | None] = Queue(LINES_KEPT)
        self._closed = Event()
        # etcd3gw's own watcher takes each piece of the answer for a message, and swallows what ends its thread.
        Thread(target=_read_lines, args=(response, self._lines, self._closed), name="etcd-watch", daemon=True).start()

    @property
    def age_s(self) -> float:
        """For how long it has been read, in seconds."""
        return time.monotonic() - self._began_s

    def next(self, within_s: float) -> Mapping[str, Any] | None:
        """Return the next message, or None if there is none yet. Raises EOFError when the stream has ended."""
        try:
            line = self._lines.get(timeout=within_s)
        except Empty:
            return None
        if line is None:
            raise EOFError
        message: Mapping[str, Any] = json.loads(line)
        return message

    def close(self) -> None:
        """End it. Safe to repeat."""
        # In a child of the process that opened it, connection and thread are the parent's.
        if os.getpid() != self._process:
            return
        self._closed.set()
        # It may have ended already.
        with suppress(ValueError, RuntimeError, OSError):
            self._response.raw.shutdown()


def _read_lines(response: requests.Response, lines: Queue[bytes | None], closed: Event) -> None:
    with response:
        # However it ends, there is nothing more to read.
        with suppress(requests.RequestException, OSError):
            for line in response.iter_lines(chunk_size=CHUNK):
                if line and not _handed_over(line, lines, closed):
                    return
        _handed_over(None, lines, closed)


def _handed_over(line: bytes | None, lines: Queue[bytes | None], closed: Event) -> bool:
    while not closed.is_set():
        with suppress(Full):
            lines.put(line, timeout=0.5)
            return True
    return False


def key_value(found: Mapping[str, Any]) -> KeyValue:
    """Return a key as the gateway tells of it; it leaves out what is empty."""
    return KeyValue(
        key=base64.b64decode(found["key"]).decode(),
        value=base64.b64decode(found.get("value", "")).decode(),
        created=int(found.get("create_revision", 0)),
        modified=int(found.get("mod_revision", 0)),
        lease=int(found.get("lease", 0)),
    )


def _posted(client: Etcd3Client, path: str, body: Mapping[str, Any], headers: Mapping[str, str]) -> Mapping[str, Any]:
    answer: Mapping[str, Any] = client.post(client.get_url(path), json=body, headers=headers)
    return answer


def _headers(token: str | None) -> Mapping[str, str]:
    return {"Authorization": token} if token else {}


def _reason(exc: Exception) -> str:
    """What etcd says, or how it failed to answer."""
    detail = getattr(exc, "detail_text", None) or str(exc)
    with suppress(ValueError, AttributeError):
        answer = json.loads(detail)
        return str(answer.get("error") or answer.get("message") or detail)
    return f"{type(exc).__name__}: {detail}"


def _encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()
