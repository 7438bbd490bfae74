"""Nodes come and go all the time, or most of them go at once."""

from __future__ import annotations

import time

import pytest

from tests.chaos.conftest import ByLevel, Report
from tests.chaos.harness import FORGIVING, PATIENT, QUICK, Chaos
from tests.process.accounts import END_S
from tests.waiting import wait_until

MOST = 12
"""So many are alive or starting at most: where a start takes long, they would fill the machine."""


@pytest.mark.chaos("short")
@pytest.mark.timed
@pytest.mark.timeout(900)
def test_nodes_that_come_and_go_every_second_lose_and_double_nothing(chaos: Chaos, by_level: ByLevel) -> None:
    with chaos.nodes(3, environ=PATIENT | FORGIVING) as nodes:
        nodes.wait_ready()
        with chaos.load() as load:
            until_s = time.monotonic() + by_level(short=15, full=120)
            while time.monotonic() < until_s:
                if len(nodes.alive) < MOST:
                    nodes.add()
                time.sleep(1.0)  # The pace is the fault.
                if len(nodes.working()) >= 3:
                    leaving = nodes.pick()[0]
                    if chaos.rng.random() < 0.5:
                        nodes.kill(leaving)
                    else:
                        nodes.dismiss(leaving)
            nodes.wait_ready()
            chaos.checker.check(load, nodes.kills)


@pytest.mark.chaos("short")
@pytest.mark.timed
@pytest.mark.timeout(900)
def test_a_third_of_all_nodes_may_die_at_once(chaos: Chaos, by_level: ByLevel, report_recovery: Report) -> None:
    number = by_level(short=6, full=30)
    # Every setting of time is at its default.
    with chaos.nodes(number, environ=FORGIVING) as nodes:
        nodes.wait_ready()
        with chaos.load() as load:
            time.sleep(chaos.rng.uniform(1, 2))  # A random instant is what this is about.
            nodes.kill(*nodes.pick(number // 3))
            chaos.checker.every_job_is_somewhere(load)
            chaos.checker.check(load, nodes.kills)
        assert len(report_recovery(chaos, nodes.kills)) == number // 3
        chaos.checker.the_cluster_is_quiet(number)


@pytest.mark.chaos("core")
def test_the_first_node_that_joins_does_the_work_of_the_last_that_died(chaos: Chaos) -> None:
    with chaos.nodes(1, pools=("prefork",), environ=QUICK | FORGIVING) as nodes:
        nodes.wait_ready()
        with chaos.load(most_open=1000) as load:
            wait_until(lambda: len(chaos.history.committed) >= 20, END_S, "it works")
            nodes.kill(*nodes.alive)
            accepted = len(load.expected)
            wait_until(lambda: len(load.expected) > accepted + 10, END_S, "jobs come though nobody lives")
            chaos.checker.every_job_is_somewhere(load)
            nodes.add()
            nodes.wait_ready()
            chaos.checker.check(load, nodes.kills)
