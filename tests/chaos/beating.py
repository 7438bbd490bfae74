"""An app whose own beat sends the checks: with RedBeat, or with one that knows nothing of others."""

from __future__ import annotations

import os
from datetime import timedelta

from cluster_tasks.tasks.control import CHECK_HEALTH
from tests.process.jobs import make_jobs

app = make_jobs().app
app.config_from_object(
    {
        "beat_scheduler": os.environ["TEST_SCHEDULER"],
        "beat_schedule": {
            "check": {
                "task": CHECK_HEALTH,
                "schedule": timedelta(seconds=0.25),
                "options": {"queue": f"{os.environ['CLUSTER_NAME']}.control"},
            }
        },
    }
)
