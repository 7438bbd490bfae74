"""The app of the tests, which publishes what follows a job only twice before it gives up."""

from __future__ import annotations

from cluster_tasks.broker import amqp
from tests.process.jobs import make_jobs

amqp.SEQUEL_POLICY["max_retries"] = 1
app = make_jobs().app
