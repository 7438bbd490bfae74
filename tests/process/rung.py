"""The app of the tests on nodes that do not look for work by themselves: they come when they are rung."""

from __future__ import annotations

from cluster_tasks.broker import channel
from tests.process.jobs import make_jobs

channel.IDLE_WAIT_S = 3600.0
app = make_jobs().app
