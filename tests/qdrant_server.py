"""Qdrant's HTTP interface over its local mode: no server is needed to speak with one as clients do.

It knows the requests that stores send, in the form of the client's own models, and refuses all others.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from pydantic import BaseModel
from qdrant_client import models
from qdrant_client.local.qdrant_local import QdrantLocal

Answer = tuple[int, Any]
ROUTE = re.compile(r"/collections(?:/(?P<name>[^/]+)(?:/(?P<rest>.+))?)?")


class QdrantServer:
    """On a free port. ``failing`` is the status that requests are answered with, 0: none is; ``failing_at``, which."""

    def __init__(self, key: str = "") -> None:
        self.key, self.failing, self.requests = key, 0, list[str]()
        self.failing_at = ""
        self._qdrant, self._turn = QdrantLocal(":memory:"), threading.Lock()
        self._server: ThreadingHTTPServer | None = None
        self.port = 0

    @property
    def url(self) -> str:
        return f"qdrant://{self.key and f':{self.key}@'}127.0.0.1:{self.port}"

    def start(self) -> None:
        """Answer, with the data of before, at the address of before."""
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), self._handler())
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Refuse connections."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def answer(self, method: str, path: str, key: str, body: Any) -> Answer:
        self.requests.append(f"{method} {path}")
        route = ROUTE.fullmatch(path)
        if self.failing and self.failing_at in ("", f"{method} {route and route['rest']}"):
            return self.failing, {"error": "as the test wants it"}
        if key != self.key:
            return 401, {"error": "Must provide an API key or an Authorization bearer token"}
        if route is None:
            return 400, {"error": f"the tests know no {method} {path}"}
        with self._turn:
            try:
                return 200, self._done(method, route["name"], route["rest"], body)
            except ValueError as exc:
                words = str(exc)
                missing, taken = "not found" in words, "already exists" in words
                return 404 if missing else 409 if taken else 400, {"error": words}

    def _done(self, method: str, name: str | None, rest: str | None, body: Any) -> Any:
        if name is None:
            return self._qdrant.get_collections()
        do: dict[str, Callable[[], Any]] = {
            "GET ": lambda: self._qdrant.get_collection(name),
            "GET exists": lambda: {"exists": self._qdrant.collection_exists(name)},
            "PUT ": lambda: self._create(name, models.CreateCollection(**body)),
            "DELETE ": lambda: self._qdrant.delete_collection(name),
            "PUT index": lambda: self._qdrant.get_collection(name) and _DONE,
            "PUT points": lambda: self._qdrant.upsert(name, models.PointsList(**body).points),
            "POST points": lambda: self._qdrant.retrieve(name, body["ids"], with_payload=body["with_payload"]),
            "POST points/delete": lambda: self._qdrant.delete(name, models.FilterSelector(**body)),
            "POST points/count": lambda: self._qdrant.count(name, models.CountRequest(**body).filter),
            "POST points/scroll": lambda: self._scroll(name, models.ScrollRequest(**body)),
            "POST points/query/batch": lambda: self._qdrant.query_batch_points(
                name, models.QueryRequestBatch(**body).searches
            ),
        }
        what = f"{method} {rest or ''}"
        if what not in do:
            raise ValueError(f"the tests know no {what}")
        return do[what]()

    def _create(self, name: str, asked: models.CreateCollection) -> bool:
        return self._qdrant.create_collection(name, asked.vectors, asked.sparse_vectors, asked.metadata)

    def _scroll(self, name: str, asked: models.ScrollRequest) -> Any:
        found, following = self._qdrant.scroll(
            name, asked.filter, asked.limit or 10, offset=asked.offset, with_payload=asked.with_payload or False
        )
        return models.ScrollResult(points=found, next_page_offset=following)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length)) if length else None
                path, key = urlsplit(self.path).path, self.headers.get("api-key", "")
                status, result = server.answer(self.command, path, key, body)
                said = {"result": _plain(result), "status": "ok", "time": 0.0}
                if status != 200:
                    said = {"status": result, "time": 0.0}
                written = json.dumps(said).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(written)))
                self.end_headers()
                self.wfile.write(written)

            do_GET = do_PUT = do_POST = do_DELETE = do  # noqa: N815 - http.server names them.

            def log_message(self, *args: Any) -> None:
                """Say nothing."""

        return Handler


_DONE = models.UpdateResult(operation_id=0, status=models.UpdateStatus.COMPLETED)


def _plain(result: Any) -> Any:
    if isinstance(result, BaseModel):
        return result.model_dump(mode="json", exclude_none=True)
    if isinstance(result, list):
        return [_plain(each) for each in result]
    return result
