"""A webhook on the loopback that does what a test wants."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Hook:
    """What arrived, and how it is answered: with a status, or by whatever ``behave`` does."""

    port: int = 0
    statuses: list[int] = field(default_factory=list)
    """Of the next answers; then 200."""
    behave: Callable[[BaseHTTPRequestHandler], None] | None = None
    requests: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    """Headers (their names in small letters, and the path among them) and bodies of all requests."""
    taken: list[dict[str, Any]] = field(default_factory=list)
    """What was answered with 200."""

    @property
    def url(self) -> str:
        """Where to post."""
        return f"http://127.0.0.1:{self.port}/alerts?key=hidden"

    def kinds(self) -> list[str]:
        """The kinds of the events that were taken."""
        return [event["kind"] for event in self.taken]


@contextmanager
def serving(hook: Hook) -> Iterator[Hook]:
    """Answer until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            hook.requests.append(({**headers, "path": self.path}, body))
            if hook.behave is not None:
                hook.behave(self)
                return
            status = hook.statuses.pop(0) if hook.statuses else 200
            if status == 200:
                hook.taken.append(json.loads(body))
            self.send_response(status)
            self.send_header("Location", f"http://127.0.0.1:{hook.port}/elsewhere")
            self.end_headers()

        def do_GET(self) -> None:
            hook.requests.append(({"method": "GET"}, b""))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        allow_reuse_address = True

        def handle_error(self, *_: Any) -> None:
            """Senders that give up are part of the tests."""

    server = Server(("127.0.0.1", hook.port), Handler)
    hook.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hook
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
