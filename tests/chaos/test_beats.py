"""Checks are sent by two beats, of which one dies: no check piles up, and failovers are done all the time."""

from __future__ import annotations

import signal
import time

import pytest

from benchmarks.forks import END_S, Forks
from tests.chaos.stage import Stage
from tests.waiting import wait_until

APP = "tests.chaos.beating"


@pytest.mark.chaos("short")
@pytest.mark.parametrize("scheduler", ["redbeat.RedBeatScheduler", "celery.beat.Scheduler"])
def test_of_two_beats_one_may_die(scheduler: str, forks: Forks, redis_url: str) -> None:
    stage = Stage.set_up(forks, redis_url, "beats")
    cluster, control = stage.cluster, stage.cluster.keys.control_queue
    environ = {"TEST_SCHEDULER": scheduler}
    beats = [stage.start(f"beat{number}", APP, "beat", "-l", "INFO", **environ) for number in range(2)]
    wait_until(lambda: cluster.client.llen(control), END_S, "a check is sent")
    waiting = set()
    until_s = time.monotonic() + 1.5
    while time.monotonic() < until_s:
        waiting.add(cluster.client.llen(control))
    assert waiting == {1}

    # A node that also consumes the checks: it coordinates by what the beats send, and else by itself.
    stage.worker("a", APP, "-Q", control, **environ)
    stage.wait_finished()
    before = wait_until(cluster.checks_done, END_S, "checks are run")
    wait_until(lambda: cluster.checks_done() > before, END_S, "checks go on")
    active = [beat for beat in beats if "Sending due task" in beat.read_log()]
    assert active
    active[0].send_signal(signal.SIGKILL)
    active[0].wait()
    # Until the other beat sends, the node acts by itself.
    stage.wait_finished(stage.lose_another())
    after = cluster.checks_done()
    wait_until(lambda: cluster.checks_done() > after + 2, END_S, "the other beat sends checks")
    assert cluster.client.llen(control) <= 1
