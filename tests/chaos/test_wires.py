"""Connections and replies are cut under load."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from tests.chaos.conftest import ByLevel
from tests.chaos.harness import FORGIVING, PATIENT, POOLS, chaos_on
from tests.chaos.load import KINDS
from tests.process.proxy import wire_to
from workers.redis_server import RedisServer


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "kinds",
    [
        pytest.param(KINDS, marks=pytest.mark.chaos("core"), id="all kinds"),
        pytest.param(("chord", "chained", "retrying"), marks=pytest.mark.chaos("short"), id="what follows others"),
    ],
)
def test_cut_connections_and_lost_replies_lose_and_double_nothing(
    kinds: tuple[str, ...], redis_server: RedisServer, tmp_path: Path, rng: random.Random, by_level: ByLevel
) -> None:
    environ = PATIENT | FORGIVING
    with wire_to(redis_server.port) as wire, chaos_on(redis_server.url, tmp_path, rng, nodes_url=wire.url) as chaos:
        client = chaos.jobs.cluster.client
        with chaos.nodes(3, pools=POOLS, environ=environ) as nodes:
            nodes.wait_ready()
            with chaos.load(kinds=kinds) as load:
                for _ in range(by_level(core=60, full=300)):
                    time.sleep(rng.uniform(0, 0.3))
                    if rng.random() < 0.5:
                        wire.cut_replies(rng.randrange(1, 4))
                    else:
                        # What tasks note goes another way, and is no part of what is tested.
                        passing = wire.addresses
                        ids = [entry["id"] for entry in client.client_list() if entry["addr"] in passing]
                        client.client_kill_filter(_id=rng.choice(ids))
                assert wire.cut > 10
                chaos.checker.check(load)
            assert [worker.exit_code() for worker in nodes.alive] == [None] * 3
