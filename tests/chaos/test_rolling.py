"""Every node is ended in turn and replaced, as in a deploy, while jobs come and run."""

from __future__ import annotations

import pytest

from tests.chaos.conftest import ByLevel
from tests.chaos.harness import POOLS, Chaos

NODES = 3


@pytest.mark.chaos("core")
@pytest.mark.timeout(900)
def test_nodes_that_are_told_to_end_in_turn_charge_nobody_and_run_nothing_twice(
    chaos: Chaos, by_level: ByLevel
) -> None:
    with chaos.nodes(NODES, pools=POOLS) as nodes:
        nodes.wait_ready()
        with chaos.load() as load:
            for _ in range(NODES * by_level(core=1, full=10)):
                oldest = nodes.alive[0]
                nodes.add()
                nodes.wait_ready()
                assert nodes.retire(oldest) == 0
                chaos.checker.every_job_is_somewhere(load)
            chaos.checker.check(load)
        chaos.checker.nothing_ran_twice(load)
        chaos.checker.the_cluster_is_quiet(NODES)
    assert not chaos.jobs.cluster.quarantine.jobs()
