"""Celery's request, watched for how jobs end."""

from __future__ import annotations

from typing import Any

from celery.exceptions import Ignore, Retry
from celery.worker.request import Request

from workers.load import outcomes


class ClusterRequest(Request):  # type: ignore[misc]
    """Tells this node's statistics how each job ended."""

    _failed = False

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> Any:
        self._failed = not isinstance(exc_info.exception, Retry | Ignore)
        return super().on_failure(exc_info, send_failed_event=send_failed_event, return_ok=return_ok)

    def acknowledge(self) -> None:
        if not self.acknowledged:
            outcomes.record(not self._failed)
        super().acknowledge()
