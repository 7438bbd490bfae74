"""A Redis of its own for each test module, and proof that the run leaves no process behind."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import psutil
import pytest

from benchmarks.forks import close_fork_server
from cluster_tasks.errors import ConfigurationError
from cluster_tasks.redis_store import connect
from tests.chaos import levels
from tests.etcd_server import EtcdServer
from tests.servers import missing, redis_for_results
from workers.redis_server import RedisServer, find_redis_server

# Every process of the run inherits it, so that those whose parent has died are found too.
MARK = "PYTEST_RUN_MARK"
LEFT_BEHIND = pytest.StashKey[list[str]]()
DIRECTORY = pytest.StashKey[Path]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Take the options of the chaos suite, here because they must be known before that is looked at."""
    levels.add_options(parser)


def pytest_report_header(config: pytest.Config) -> str:
    """Say how to have a run again."""
    return levels.header(config)


def pytest_configure(config: pytest.Config) -> None:
    """Nothing of the caller's cluster may reach the tests, nor the tests his cluster."""
    levels.configure(config)
    for variable in [name for name in os.environ if name.startswith("CLUSTER_")]:
        del os.environ[variable]
    os.environ[MARK] = uuid.uuid4().hex
    # A busy machine may let any example wait.
    hypothesis.settings.register_profile("without deadlines", deadline=None)
    hypothesis.settings.load_profile("without deadlines")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """End the processes that tests left behind, and let the run fail for it."""
    # What was told to end may still be ending.
    _, alive = psutil.wait_procs(_processes_of_this_run(session.config.stash.get(DIRECTORY, None)), timeout=5)
    names = [f"{process.pid} {' '.join(process.cmdline()) or process.name()}" for process in alive if _runs(process)]
    for process in alive:
        process.kill()
    session.config.stash[LEFT_BEHIND] = names
    if names and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Tell how long failovers took, and name the processes that were left behind."""
    levels.tell_recoveries(terminalreporter)
    names = config.stash.get(LEFT_BEHIND, [])
    if names:
        terminalreporter.section("processes left behind by the tests", red=True)
        for name in names:
            terminalreporter.line(name)


@pytest.fixture(scope="session", autouse=True)
def _directory_of_this_run(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> None:
    pytestconfig.stash[DIRECTORY] = tmp_path_factory.getbasetemp()


@pytest.fixture(scope="session", autouse=True)
def _no_fork_server_is_left() -> Iterator[None]:
    yield
    close_fork_server()


def _processes_of_this_run(directory: Path | None) -> list[psutil.Process]:
    found = {process.pid: process for process in psutil.Process().children(recursive=True)}
    for process in psutil.process_iter():
        try:
            # Redis writes over its environment, but stays in its directory.
            at_home = directory is not None and Path(process.cwd()).is_relative_to(directory)
            if at_home or process.environ().get(MARK) == os.environ[MARK]:
                found[process.pid] = process
        except psutil.Error:  # It ended meanwhile, or belongs to somebody else.
            continue
    found.pop(os.getpid(), None)
    # Python's own helper lives until the interpreter ends.
    return [process for process in found.values() if _runs(process) and "resource_tracker" not in _command(process)]


def _runs(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


@pytest.fixture(scope="session")
def redis_binary() -> str:
    """The server to start. Missing, it skips the test on a laptop and fails it in CI."""
    try:
        return find_redis_server()
    except ConfigurationError as exc:
        missing(str(exc))


@pytest.fixture(scope="module")
def _module_redis(redis_binary: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_for_results(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def redis_server(_module_redis: RedisServer) -> RedisServer:
    """An empty, running Redis that no other module uses; a test may stop, kill and start it."""
    _module_redis.start()
    with connect(_module_redis.url) as client:
        client.flushall()
    return _module_redis


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    """The URL of ``redis_server``."""
    return redis_server.url


@pytest.fixture(scope="module")
def _module_etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    with EtcdServer(tmp_path_factory.mktemp("etcd")) as server:
        yield server


@pytest.fixture
def etcd_server(_module_etcd: EtcdServer) -> EtcdServer:
    """An empty, running etcd that no other module uses; a test may stop, kill and start it."""
    _module_etcd.start()
    _module_etcd.empty()
    return _module_etcd
