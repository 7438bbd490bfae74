"""The line goes in and out of an app at work: nothing is lost or doubled, and all else stays as it was."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from celery import Celery

from cluster_tasks.cluster import cluster_of
from cluster_tasks.redis_store import connect
from tests.process.accounts import END_S
from tests.process.adopting.shop import ADOPTED, make_shop
from tests.process.nodes import WorkerProcess, running
from tests.process.traffic import Traffic
from tests.waiting import wait_until
from workers.redis_server import RedisServer

APP = "tests.process.adopting.shop"
QUEUES = ("-Q", "shop,mail,slow")
Worker = Callable[..., WorkerProcess]
MOST_OPEN = 100


@pytest.fixture
def url(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("SHOP_URL", redis_server.url)
    return redis_server.url


@pytest.fixture
def before(url: str) -> Iterator[Celery]:
    """The app without the line."""
    with make_shop(adopted=False) as app:
        yield app
        app.backend.result_consumer.stop()
        app.backend.client.close()


@pytest.fixture
def after(url: str) -> Iterator[Celery]:
    """The app with the line."""
    with make_shop(adopted=True) as app:
        yield app


@pytest.fixture
def worker(url: str, tmp_path: Path) -> Worker:
    """Make workers of the app, with the line or without."""

    def make(name: str, adopted: bool, *options: str) -> WorkerProcess:
        environ = {"SHOP_URL": url, ADOPTED: "1" if adopted else ""}
        return WorkerProcess(name, url, tmp_path, app=APP, options=(*QUEUES, *options), environ=environ)

    return make


class Orders(Traffic):
    """Jobs of the app, about ``MOST_OPEN`` at a time: what waits behind slow workers has to end within the test."""

    def __init__(self, app: Celery) -> None:
        super().__init__(pause_s=0.03)
        self._app = app

    def send(self, number: int) -> None:
        if len(self.results) > MOST_OPEN and not self.results[-MOST_OPEN].ready():
            return
        tasks = self._app.tasks
        self.results.append(tasks["shop.price"].delay(str(number % 7), 0.02))
        self.results.append(tasks[("shop.mail", "shop.slow_price")[number % 2]].delay())
        if number % 5 == 0:
            self.results.append(tasks["shop.price"].apply_async(("late",), countdown=2))


def each_ran_once(url: str, orders: list[Orders], ended: Sequence[WorkerProcess] = ()) -> None:
    """``ended`` are plain workers that were stopped: one whose pool takes long to end gives back what it has done."""
    results = [result for sender in orders for result in sender.results]
    assert len(results) > 50
    for result in results:
        result.get(timeout=END_S)
    with connect(url) as client:
        ran = {result.id: client.lrange(f"test:ran:{result.id}", 0, -1) for result in results}
        again = {job_id: hosts for job_id, hosts in ran.items() if len(hosts) != 1}
        assert all(hosts[0].startswith(b"old") and len(hosts) == 2 for hosts in again.values()), again
        given_back = [int(n) for worker in ended for n in re.findall(r"Restoring (\d+) unack", worker.read_log())]
        assert len(again) <= sum(given_back), again
        audited = {job_id: f"test:audited:{job_id}" for job_id in ran}
        wait_until(lambda: all(client.llen(audited[job_id]) == len(ran[job_id]) for job_id in ran), END_S)


@pytest.mark.parametrize("late", [False, True])
def test_routes_and_settings_of_the_app_are_kept_wherever_the_line_stands(late: bool, url: str) -> None:
    with make_shop(adopted=True, late=late) as app, make_shop(adopted=False) as plain:
        for name in ("shop.mail", "shop.tick", "shop.unknown", "shop.slow_unknown"):
            own = app.amqp.router.route({}, name, task_type=app.tasks.get(name))
            assert own["queue"].name == plain.amqp.router.route({}, name)["queue"].name
        marked = app.amqp.router.route({}, "shop.slow_price", task_type=app.tasks["shop.slow_price"])
        assert marked["queue"].name == "waiting.llm"
        for key in ("task_default_queue", "task_serializer", "worker_prefetch_multiplier", "beat_schedule"):
            assert app.conf[key] == plain.conf[key]
        assert list(app.amqp.queues) == list(plain.amqp.queues)


@pytest.mark.timeout(240)
def test_nodes_take_over_from_workers_at_work(url: str, before: Celery, after: Celery, worker: Worker) -> None:
    stock = [worker(name, False) for name in ("old1", "old2")]
    with running(*stock), Orders(before) as old:
        wait_until(lambda: len(old.results) > 60, END_S)
        # Old producers go on sending while nodes and new ones join.
        with running(worker("new1", True), worker("new2", True)), Orders(after) as new:
            wait_until(lambda: len(new.results) > 60, END_S)
            assert [each.stop() for each in stock] == [0, 0]
            sent = len(old.results)
            wait_until(lambda: len(old.results) > sent + 60, END_S)
            for sender in (old, new):
                sender.stop()
            each_ran_once(url, [old, new], stock)


@pytest.mark.timeout(240)
def test_the_way_back_loses_and_doubles_nothing(url: str, before: Celery, after: Celery, worker: Worker) -> None:
    nodes = [worker(name, True) for name in ("new1", "new2")]
    with running(*nodes), Orders(after) as new, Orders(before) as old:
        wait_until(lambda: len(new.results) > 120, END_S)
        refused = release("--json")
        assert (refused.returncode, refused.stdout) == (1, "")
        assert "stop them first: new1@test, new2@test" in refused.stderr
        assert [node.stop() for node in nodes] == [0, 0]
        new.stop()
        assert release().stdout.startswith("jobs given back: ")
        with running(worker("old1", False)):
            old.stop()
            each_ran_once(url, [old, new])
    with connect(url) as client:
        left = {key.decode() for key in client.scan_iter("cluster:*")}
        assert not {key for key in left if key.startswith(("cluster:unacked", "cluster:remains"))}
    assert not cluster_of(after).epochs.lengths()
    assert not cluster_of(after).delayed()


def test_what_a_killed_node_held_is_given_back_too(url: str, after: Celery, worker: Worker) -> None:
    with running(worker("new1", True)) as (node,):
        results = [after.tasks["shop.price"].delay("a", 0.5) for _ in range(6)]
        results.append(after.tasks["shop.price"].apply_async(("b",), countdown=8))
        with connect(url) as client:
            wait_until(lambda: client.llen(f"test:ran:{results[0].id}"), END_S, "it works")
        node.kill()
    assert release("--json").returncode == 0
    with running(worker("old1", False)):
        assert all(result.get(timeout=END_S) for result in results)


def test_jobs_that_share_a_message_are_given_back_one_by_one(url: str, after: Celery, worker: Worker) -> None:
    sent = cluster_of(after).submit(after.tasks["shop.price"], ["a", "b", "c"])
    assert sum(cluster_of(after).epochs.lengths().values()) == 1
    assert json.loads(release("--json").stdout) == {"released": 3}
    with running(worker("old1", False)):
        assert len(sent.get(timeout=END_S)) == 3
    assert not cluster_of(after).epochs.lengths()


def test_the_schedule_of_the_app_is_sent_once(url: str, after: Celery, worker: Worker, tmp_path: Path) -> None:
    silent = subprocess.DEVNULL
    environ = {**os.environ, "SHOP_URL": url, ADOPTED: "1", "CLUSTER_BROKER_URL": url}
    schedule = str(tmp_path / "schedule")
    commands = [["beat", "-s", schedule, "--pidfile="], ["cluster", "coordinator", "-n", "c@test"]]
    with running(worker("new1", True), worker("new2", True)), connect(url) as client:
        started = [
            subprocess.Popen([sys.executable, "-m", "celery", "-A", APP, *words], env=environ, stderr=silent)
            for words in commands
        ]
        try:
            wait_until(lambda: client.llen("test:ticks") >= 6, END_S, "it ticks")
            wait_until(lambda: cluster_of(after).checks_done() > 2, END_S, "the coordinator checks")
            sent = client.llen("test:ticks")
            beaten_s = client.time()[0]
            wait_until(lambda: client.llen("test:ticks") >= sent + 6, END_S)
            # Two a second; had each process of the cluster a schedule of its own, there would be twice as many.
            assert client.llen("test:ticks") - sent <= 2 * (client.time()[0] - beaten_s + 1) + 1
        finally:
            for process in started:
                process.terminate()
                process.wait(END_S)


def release(*words: str) -> subprocess.CompletedProcess[str]:
    """Run the command as after the line is gone."""
    command = [sys.executable, "-m", "celery", "-A", APP, "cluster", "release", *words]
    environ = {name: value for name, value in os.environ.items() if name != ADOPTED}
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=END_S, check=False)
