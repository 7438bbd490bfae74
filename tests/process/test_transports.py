"""Every way to reach a Redis carries jobs, results and heartbeats."""

from __future__ import annotations

import asyncio
import signal
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import pytest
import redis

from cluster_tasks.tasks import stream
from tests.certificates import make_certificate
from tests.process.accounts import END_S
from tests.process.jobs import Jobs, make_jobs
from tests.process.nodes import WorkerProcess, running
from tests.servers import redis_for_results
from tests.waiting import wait_until
from workers.redis_server import RedisServer, find_redis_server, free_port
from workers.tether import tethered, tethering

Address = Callable[[Path], AbstractContextManager[str]]


@contextmanager
def by_unix_socket(directory: Path) -> Iterator[str]:
    path = directory / "redis.sock"
    with redis_for_results(directory / "redis", extra=[f"unixsocket {path}"]):
        yield f"redis+socket://{path}?virtual_host=1"


@contextmanager
def by_tls(directory: Path, options: str = "ssl_cert_reqs=CERT_REQUIRED&ssl_ca_certs={certificate}") -> Iterator[str]:
    certificate, key = make_certificate(directory)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with redis_for_results(directory / "redis") as server, socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_unwrap, args=(listener, context, server.port), daemon=True).start()
        yield f"rediss://127.0.0.1:{listener.getsockname()[1]}/0?{options.format(certificate=certificate)}"
        listener.shutdown(socket.SHUT_RDWR)


def _unwrap(listener: socket.socket, context: ssl.SSLContext, port: int) -> None:
    """The end of TLS before a Redis that has none: the one of the wheel is built without."""
    with suppress(OSError):
        while True:
            client, _ = listener.accept()
            threading.Thread(target=_serve, args=(client, context, port), daemon=True).start()


def _serve(client: socket.socket, context: ssl.SSLContext, port: int) -> None:
    with (
        suppress(OSError),
        context.wrap_socket(client, server_side=True) as secure,
        socket.create_connection(("127.0.0.1", port)) as plain,
    ):
        back = threading.Thread(target=_pump, args=(plain, secure), daemon=True)
        back.start()
        _pump(secure, plain)
        back.join()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    for end in (source, sink):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


@contextmanager
def by_sentinel(directory: Path) -> Iterator[str]:
    with redis_for_results(directory / "redis") as master, sentinel_of(directory, master) as port:
        yield f"sentinel://127.0.0.1:{port}/0"


@contextmanager
def sentinel_of(directory: Path, master: RedisServer, *options: str) -> Iterator[int]:
    """Run one Sentinel that knows ``master`` as mymaster; gives its port."""
    port, home = free_port(), directory / "sentinel"
    home.mkdir()
    known = [f"sentinel monitor mymaster 127.0.0.1 {master.port} 1", *options]
    (home / "sentinel.conf").write_text("\n".join([f"port {port}", "bind 127.0.0.1", f"dir {home}", *known, ""]))
    command = tethered(signal.SIGTERM, [find_redis_server(), str(home / "sentinel.conf"), "--sentinel"])
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(command, env=tethering(), stdout=log, stderr=log)
    try:
        with redis.Redis(port=port) as client:
            wait_until(lambda: _answers(client), END_S, "Sentinel answers")
        yield port
    finally:
        process.terminate()
        process.wait(END_S)


def _answers(client: redis.Redis) -> bool:
    with suppress(redis.RedisError):
        return bool(client.ping())
    return False


async def by_asyncio(jobs: Jobs) -> set[str]:
    """Wait for jobs, and read the text of one."""
    waited = await asyncio.gather(*(jobs.cluster.wait(jobs.work.delay(0.05), END_S) for _ in range(4)))
    return {*waited, "".join([text async for text in stream(jobs.work, 0.05, timeout_s=END_S)])}


@pytest.mark.parametrize("address", [by_unix_socket, by_tls, by_sentinel])
def test_jobs_and_results_travel(
    address: Address, redis_binary: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with address(tmp_path) as url:
        monkeypatch.setenv("CLUSTER_BROKER_URL", url)
        jobs = make_jobs()
        # Tasks of this app note their starts in a Redis that redis-py knows by this URL.
        with RedisServer(tmp_path / "notes") as notes:
            environ = {"TEST_NOTES_URL": notes.url}
            with running(
                *(WorkerProcess(pool, url, tmp_path, pool=pool, environ=environ) for pool in ("prefork", "solo"))
            ):
                results = [jobs.work.delay(0.05) for _ in range(20)]
                assert {result.get(timeout=END_S) for result in results} <= {"prefork@test", "solo@test"}
                assert asyncio.run(by_asyncio(jobs)) <= {"prefork@test", "solo@test"}
                assert len(jobs.cluster.nodes()) == 2
                assert jobs.plain.delay(1).get(timeout=END_S) == 2
        del results
        jobs.app.close()
