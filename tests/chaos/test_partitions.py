"""Single nodes are cut off from Redis, wholly, in one direction and again and again, and come back."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.chaos.conftest import ByLevel
from tests.chaos.harness import FORGIVING, POOLS, Chaos, chaos_on
from tests.chaos.load import Load
from tests.chaos.partitions import Link, redis_behind_links
from tests.process.accounts import END_S
from tests.process.nodes import WorkerProcess, running
from tests.waiting import wait_until

CUTS = {
    "full": {"requests": True, "replies": True},
    "requests": {"requests": True, "replies": False},
    "replies": {"requests": False, "replies": True},
}
CUT_OFF_S = 8.0
"""Longer than any time-out of a node, so that all that it had asked for is given up when the network is whole again."""


@dataclass(frozen=True)
class Divided:
    """Three nodes whose ways to Redis can be cut."""

    chaos: Chaos
    workers: list[WorkerProcess]
    links: list[Link]

    def epoch(self, number: int) -> str:
        """The epoch under which a node works now."""
        beat = self.chaos.jobs.cluster.epochs.beats().get(self.workers[number].id)
        return beat.epoch if beat else ""

    def started(self, number: int) -> int:
        """How many jobs a node has ever started."""
        notes = self.chaos.notes
        own = self.workers[number].id.encode()
        return sum(notes.lrange(key, 0, -1).count(own) for key in notes.scan_iter("test:started:*", count=1000))


@pytest.fixture
def divided(redis_binary: str, tmp_path: Path, rng: random.Random) -> Iterator[Divided]:
    """Every setting of time is at its default."""
    with ExitStack() as stack:
        server, links, notes_url = stack.enter_context(redis_behind_links(tmp_path / "redis", 3))
        chaos = stack.enter_context(chaos_on(server.url, tmp_path, rng, notes_url=notes_url))
        workers = [
            chaos.worker(f"n{number}", pool, broker_url=link.url, within=link.within, environ=FORGIVING)
            for number, (pool, link) in enumerate(zip(POOLS, links, strict=True), 1)
        ]
        stack.enter_context(running(*workers))
        yield Divided(chaos, workers, links)


def cut_off(divided: Divided, number: int, how: str) -> None:
    """Cut a node off until others have its work and all its own time-outs have passed; then let it come back."""
    chaos, link, epoch = divided.chaos, divided.links[number], divided.epoch(number)
    began_s = time.monotonic()
    link.cut(**CUTS[how])
    wait_until(lambda: epoch in chaos.history.fences, END_S, "it is fenced")
    started = divided.started(number)
    wait_until(lambda: epoch in chaos.history.moved, END_S, "its work is moved")
    detected_s = time.monotonic() - began_s
    time.sleep(max(0.0, CUT_OFF_S - detected_s))
    assert divided.started(number) == started, "a node that is cut off starts nothing once others may have its jobs"
    link.heal()
    healed_s = time.monotonic()
    wait_until(lambda: divided.epoch(number) not in ("", epoch), END_S, "it joins anew")
    wait_until(lambda: divided.started(number) > started, END_S, "it works again")
    back_s = time.monotonic() - healed_s
    print(f"{how}: its work was moved after {detected_s:.1f} s; healed, it worked after {back_s:.1f} s")


def settle(divided: Divided, load: Load, cut: set[str]) -> None:
    divided.chaos.checker.check(load, also_lost=cut)
    assert [worker.exit_code() for worker in divided.workers] == [None] * 3


@pytest.mark.chaos("core")
@pytest.mark.timeout(180)
def test_a_node_that_is_cut_off_stops_before_others_do_its_work(divided: Divided) -> None:
    with divided.chaos.load() as load:
        number = divided.chaos.rng.randrange(3)
        cut_off(divided, number, "full")
        settle(divided, load, {divided.workers[number].id})


@pytest.mark.chaos("short")
@pytest.mark.timeout(600)
def test_a_node_that_is_cut_off_in_one_direction_stops_before_others_do_its_work(divided: Divided) -> None:
    with divided.chaos.load() as load:
        for how in ("requests", "replies"):
            cut_off(divided, divided.chaos.rng.randrange(3), how)
        settle(divided, load, {worker.id for worker in divided.workers})


@pytest.mark.chaos("short")
@pytest.mark.timeout(600)
def test_networks_that_come_and_go_lose_and_double_nothing(divided: Divided, by_level: ByLevel) -> None:
    rng = divided.chaos.rng
    until_s = time.monotonic() + by_level(short=15, full=120)
    with divided.chaos.load() as load:
        while time.monotonic() < until_s:
            link, how = rng.choice(divided.links), rng.choice(list(CUTS.values()))
            link.cut(**how)
            time.sleep(rng.uniform(0.05, 2))
            link.heal()
            time.sleep(rng.uniform(0.05, 1))
        settle(divided, load, {worker.id for worker in divided.workers})
