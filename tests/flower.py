"""A Flower with the cluster page in this process, and the questions that tests ask of it."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import flower.app
from celery import Celery
from flower import urls
from flower.options import default_options
from tornado.httpserver import HTTPServer
from tornado.ioloop import IOLoop
from tornado.netutil import bind_sockets

from cluster_tasks import cluster_of
from cluster_tasks.flower.handlers import page_handlers
from cluster_tasks.flower.templates import Templates

START_S = 60.0


@dataclass(frozen=True)
class Answer:
    """What a server has answered."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def text(self) -> str:
        """The body."""
        return self.body.decode()

    @property
    def told(self) -> Any:
        """The JSON in the body."""
        return json.loads(self.body)


@dataclass(frozen=True)
class Site:
    """A Flower that runs."""

    port: int
    prefix: str = ""

    @property
    def url(self) -> str:
        """Where it begins."""
        return f"http://127.0.0.1:{self.port}{self.prefix}"

    def ask(self, path: str, method: str = "GET", **headers: str) -> Answer:
        """Ask once; redirects are not followed. Names of headers have an underscore for each dash."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, self.prefix + path, headers=named)
            answer = connection.getresponse()
            return Answer(answer.status, answer.headers, answer.read())

    def post(self, path: str, **headers: str) -> Answer:
        """Ask as our page does: with the token that it was given, in cookie and header."""
        cookie = self.ask("/cluster", **headers).headers["Set-Cookie"].partition(";")[0]
        token = cookie.partition("=")[2]
        own = headers.pop("Cookie", "")
        return self.ask(path, "POST", Cookie=f"{cookie}; {own}", X_XSRFToken=token, Content_Length="0", **headers)


@contextmanager
def flower_site(app: Celery, **options: Any) -> Iterator[Site]:
    """Serve Flower with the page of the app's cluster, as ``celery -A APP flower`` makes it."""
    given = SimpleNamespace(**{**default_options.as_dict(), **options})
    ready, ports, end = threading.Event(), [], asyncio.Event()
    handlers = [*urls.handlers[:-1], *page_handlers(cluster_of(app)), urls.handlers[-1]]
    settings = {**urls.settings, "template_loader": Templates(urls.settings["template_path"])}

    async def serve() -> None:
        with mock.patch.object(flower.app, "default_handlers", handlers):
            made = flower.app.Flower(capp=app, options=given, io_loop=IOLoop.current(), **settings)
        server = HTTPServer(made)
        sockets = bind_sockets(0, "127.0.0.1")
        server.add_sockets(sockets)
        ports.append((asyncio.get_running_loop(), sockets[0].getsockname()[1]))
        ready.set()
        await end.wait()
        server.stop()
        await server.close_all_connections()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="flower", daemon=True)
    thread.start()
    try:
        assert ready.wait(START_S)
        loop, port = ports[0]
        yield Site(port, f"/{options['url_prefix']}" if options.get("url_prefix") else "")
    finally:
        if ports:
            loop.call_soon_threadsafe(end.set)
        thread.join(START_S)
