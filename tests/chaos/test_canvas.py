"""Chains and chords whose steps, parts, bodies and dispatchers die midway."""

from __future__ import annotations

import time

import pytest

from tests.chaos.conftest import ByLevel
from tests.chaos.harness import FORGIVING, PATIENT, POOLS, Chaos
from tests.process.accounts import END_S
from tests.waiting import wait_until


@pytest.mark.chaos("short")
@pytest.mark.timeout(1200)
def test_chains_and_chords_come_to_their_ends_though_their_nodes_die(chaos: Chaos, by_level: ByLevel) -> None:
    kills = by_level(short=6, full=60)
    with chaos.nodes(5, pools=POOLS, environ=PATIENT | FORGIVING) as nodes:
        nodes.wait_ready()
        kinds = ("chained", "chord", "chord", "retrying")
        with chaos.load(kinds=kinds, lengths_s=(0.0, 0.0, 0.02), pause_s=0.01) as load:
            while len(nodes.kills) < kills:
                wait_until(lambda: len(nodes.working()) >= 4, END_S, "nodes work")
                time.sleep(chaos.rng.uniform(0, 0.5))  # A random instant is what this is about.
                nodes.kill(*nodes.pick(2))
                nodes.add(2)
            chaos.checker.check(load, nodes.kills)
