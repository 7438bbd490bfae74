"""Single nodes are cut off from Redis, wholly, in one direction and again and again, and come back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.chaos.conftest import ByLevel
from tests.chaos.divided import Divided
from tests.chaos.harness import FORGIVING, POOLS, chaos_on
from tests.chaos.partitions import redis_behind_links
from tests.process.nodes import running


@pytest.fixture
def divided(redis_binary: str, tmp_path: Path, rng: random.Random) -> Iterator[Divided]:
    """Three nodes, each with a link of its own. Every setting of time is at its default."""
    with ExitStack() as stack:
        server, links, notes_url = stack.enter_context(redis_behind_links(tmp_path / "redis", 3))
        chaos = stack.enter_context(chaos_on(server.url, tmp_path, rng, notes_url=notes_url))
        workers = [
            chaos.worker(f"n{number}", pool, broker_url=link.url, within=link.within, environ=FORGIVING)
            for number, (pool, link) in enumerate(zip(POOLS, links, strict=True), 1)
        ]
        stack.enter_context(running(*workers))
        yield Divided(chaos, workers, links)


@pytest.mark.chaos("core")
@pytest.mark.timeout(180)
def test_a_node_that_is_cut_off_stops_before_others_do_its_work(divided: Divided) -> None:
    with divided.chaos.load() as load:
        link = divided.chaos.rng.choice(divided.links)
        divided.cut_off(link, "full")
        divided.settle(load, divided.behind(link))


@pytest.mark.chaos("short")
@pytest.mark.timeout(600)
def test_a_node_that_is_cut_off_in_one_direction_stops_before_others_do_its_work(divided: Divided) -> None:
    with divided.chaos.load() as load:
        for how in ("requests", "replies"):
            divided.cut_off(divided.chaos.rng.choice(divided.links), how)
        divided.settle(load, [worker.id for worker in divided.workers])


@pytest.mark.chaos("short")
@pytest.mark.timeout(600)
def test_networks_that_come_and_go_lose_and_double_nothing(divided: Divided, by_level: ByLevel) -> None:
    with divided.chaos.load() as load:
        divided.flap(by_level(short=15, full=120))
        divided.settle(load, [worker.id for worker in divided.workers])
