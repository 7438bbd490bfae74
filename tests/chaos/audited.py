"""What the nodes of the scenarios load: ``celery -A tests.chaos.audited worker``."""

from __future__ import annotations

from tests.chaos.jobs import audit, make_chaos_jobs
from tests.chaos.threads import tell_threads

__all__ = ["app"]

audit()
tell_threads()
app = make_chaos_jobs().app
