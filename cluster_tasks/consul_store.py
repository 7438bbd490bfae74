"""Everything that is the same for each use of Consul: the client, transactions, errors."""

from __future__ import annotations

import json
import os
import select
import ssl
from base64 import b64decode, b64encode
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import quote, urlencode

from cluster_tasks.addresses.consul import ConsulUrl
from cluster_tasks.errors import ConfigurationError, UnavailableError

try:
    from consul import ACLPermissionDenied, ConsulException, NotFound, base
except ImportError as exc:
    raise ConfigurationError("a consul:// URL needs the client of Consul: pip install 'cluster-tasks[consul]'") from exc

CONNECT_TIMEOUT_S = 3.0
SOCKET_TIMEOUT_S = 5.0
"""For an answer, or the next part of one. Blocking queries must wait for less."""
OPERATIONS_AT_MOST = 64
"""That Consul takes in one transaction."""
ROLLED_BACK = 409
CONFLICTS = (
    "index is stale", "failed index check", "doesn't exist",
    "lock is already held", "due to lock delay", "current session", "invalid session",
)  # fmt: skip
"""What Consul says of a key that is not as a transaction expects it."""
IDLE_AT_MOST = 8

Operation = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Entry:
    """A key of the store."""

    key: str
    value: bytes
    index: int
    """Of its last change, by which a write makes sure that it comes right after this one; 0: there is no such key."""


class _Transport(base.HTTPClient):  # type: ignore[misc]  # python-consul2 has no types.
    """The HTTP client of python-consul2, with time-outs, safe in threads and after a fork.

    The one that it brings keeps its connections behind locks, which a fork can leave locked in the child, and
    obeys variables of the environment before the URL.
    """

    def __init__(self, url: ConsulUrl) -> None:
        # A deque needs no lock. What is on its way is in the hands of one thread.
        self._idle: deque[HTTPConnection] = deque()
        super().__init__(url.host, url.port, url.scheme)
        self._tls = _tls(url) if url.scheme == "https" else None
        self._process = os.getpid()

    def get(self, callback: Any, path: str, params: Any = None, headers: Any = None) -> Any:
        return callback(self._send("GET", path, params, headers, ""))

    def put(self, callback: Any, path: str, params: Any = None, data: Any = "", headers: Any = None) -> Any:
        return callback(self._send("PUT", path, params, headers, data))

    def delete(self, callback: Any, path: str, params: Any = None, data: Any = "", headers: Any = None) -> Any:
        return callback(self._send("DELETE", path, params, headers, data))

    def post(self, callback: Any, path: str, params: Any = None, data: Any = "", headers: Any = None) -> Any:
        return callback(self._send("POST", path, params, headers, data))

    def close(self) -> None:
        """Close the connections that are not in use. Safe to repeat."""
        while self._idle:
            try:
                self._idle.pop().close()
            except IndexError:  # Another thread took it.
                return

    def __del__(self) -> None:
        self.close()

    def _send(self, method: str, path: str, params: Any, headers: Any, body: str | bytes) -> Any:
        target = quote(path, safe="/:") + (f"?{urlencode(params)}" if params else "")
        connection = self._take()
        try:
            connection.request(method, target, body.encode() if isinstance(body, str) else body, headers or {})
            reply = connection.getresponse()
            content = reply.read()
        except BaseException:
            connection.close()
            # The idle ones are older and may lead to the same silence: each would cost a time-out more.
            self.close()
            raise
        if reply.will_close or len(self._idle) >= IDLE_AT_MOST:
            connection.close()
        else:
            self._idle.append(connection)
        return base.Response(reply.status, reply.headers, content.decode(errors="replace"), content)

    def _take(self) -> HTTPConnection:
        """Return an idle connection that its server has not closed, or a new one."""
        if self._process != os.getpid():
            # They are the parent's: two processes must not talk over one connection.
            self.close()
            self._process = os.getpid()
        while self._idle:
            try:
                connection = self._idle.pop()
            except IndexError:
                break
            if not _is_readable(connection):
                return connection
            connection.close()
        return self._connect()

    def _connect(self) -> HTTPConnection:
        if self._tls is None:
            connection = HTTPConnection(self.host, self.port, timeout=CONNECT_TIMEOUT_S)
        else:
            connection = HTTPSConnection(self.host, self.port, timeout=CONNECT_TIMEOUT_S, context=self._tls)
        try:
            connection.connect()
            connection.sock.settimeout(SOCKET_TIMEOUT_S)
        except BaseException:
            connection.close()
            raise
        return connection


class ConsulClient:
    """The parts of python-consul2 that are used here, over a transport of one's own. Does no I/O when it is made.

    All reads are consistent: they see every write that was answered, also after a change of the leader.
    """

    def __init__(self, url: ConsulUrl) -> None:
        # By these names python-consul2 finds them.
        self.http = _Transport(url)
        self.token, self.dc, self.consistency = url.token, url.datacenter, "consistent"
        self.agent = base.Consul.Agent(self)
        self._kv = base.Consul.KV(self)
        self._session = base.Consul.Session(self)

    def read(self, key: str, *, index: int = 0, wait_s: float = 0.0) -> tuple[int, Entry]:
        """Return the index of the store and what ``key`` holds, an empty entry if there is no such key.

        With an ``index``, first wait up to ``wait_s`` and a sixteenth of it for a change after that one.
        """
        answered, found = self._kv.get(key, index=index or None, wait=f"{round(wait_s * 1000)}ms")
        return int(answered or 0), _entry(found) if found else Entry(key, b"", 0)

    def transact(self, operations: Sequence[Operation], *, is_read: bool = False) -> Sequence[Entry] | None:
        """Do all ``operations``, at most 64, or none. Return what they read or wrote.

        None: a key has another index than expected, or one that is to be read does not exist.
        """
        params = [("dc", self.dc)] if self.dc else []
        if is_read:
            params.append(("consistent", "1"))
        return self.http.put(  # type: ignore[no-any-return]
            _outcome,
            "/v1/txn",
            params,
            json.dumps([{"KV": operation} for operation in operations]),
            {"X-Consul-Token": self.token} if self.token else {},
        )

    def open_session(self, ttl_s: int, lock_delay_s: int) -> str:
        """Return a new session that ends, with the keys that it locks, when it is not renewed for ``ttl_s``.

        It does not hang on the health of the agent, which the agent's neighbours may judge wrongly and too soon.
        """
        made: str = self._session.create(checks=[], behavior="delete", ttl=ttl_s, lock_delay=lock_delay_s)
        return made

    def renew_session(self, session: str) -> bool:
        """Begin the time of a session anew; return whether it was still there."""
        try:
            self._session.renew(session)
        except NotFound:
            return False
        return True

    def end_session(self, session: str) -> None:
        """End a session that may have ended already."""
        self._session.destroy(session)

    def close(self) -> None:
        """Close connections that are not in use. Safe to repeat."""
        self.http.close()


def encoded(value: str) -> str:
    """Return ``value`` as transactions take it."""
    return b64encode(value.encode()).decode()


@contextmanager
def foreign_errors(unavailable: type[UnavailableError], doing: str, permission: str) -> Iterator[None]:
    """Turn an error of Consul or of the way to it into ``unavailable``, with what was being done.

    ``permission`` is what a token needs for it, as in a rule of a policy.
    """
    try:
        yield
    except ACLPermissionDenied as exc:
        if "not found" in str(exc):
            raise unavailable(f"{doing}: Consul knows no such token; it may have been revoked") from exc
        raise unavailable(f"{doing}: the token lacks the permission {permission}: {exc}") from exc
    except (ConsulException, HTTPException, OSError, ValueError) as exc:
        raise unavailable(f"{doing}: {type(exc).__name__}: {exc}") from exc


def _outcome(reply: Any) -> Sequence[Entry] | None:
    if reply.code == ROLLED_BACK:
        reasons = {str(error["What"]) for error in json.loads(reply.body)["Errors"]}
        if any("Permission denied" in reason for reason in reasons):
            raise ACLPermissionDenied("; ".join(sorted(reasons)))
        if all(any(words in reason for words in CONFLICTS) for reason in reasons):
            return None
        raise ConsulException("; ".join(sorted(reasons)))
    results = base.CB.json()(reply)["Results"] or []
    return [_entry({**result["KV"], "Value": b64decode(result["KV"]["Value"] or "")}) for result in results]


def _entry(found: Mapping[str, Any]) -> Entry:
    return Entry(found["Key"], found["Value"] or b"", found["ModifyIndex"])


def _tls(url: ConsulUrl) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=url.ca)
        if url.cert:
            context.load_cert_chain(url.cert, url.key)
    except OSError as exc:
        files = ", ".join(f"{name}={value!r}" for name in ("ca", "cert", "key") if (value := getattr(url, name)))
        raise ConfigurationError(f"consul:// URL: {files}: {exc}; expected readable files in PEM format") from None
    if not url.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _is_readable(connection: HTTPConnection) -> bool:
    """Whether there is something to read from an idle connection: its end, or nothing that belongs to a request."""
    poll = select.poll()
    poll.register(connection.sock, select.POLLIN)
    return bool(poll.poll(0))
