"""``celery -A APP flower``: Flower's own command, that adds the cluster page for an app that is in a cluster.

Celery loads this beside Flower's entry point of the same name, in an order that nobody promises. Both yield one and the
same command, so it does not matter.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any

import click
from flower import urls
from flower.command import flower

from cluster_tasks.cluster import Cluster, cluster_of
from cluster_tasks.errors import ClusterError, ConfigurationError
from cluster_tasks.flower.handlers import page_handlers
from cluster_tasks.flower.templates import Templates

__all__ = ["flower"]

logger = logging.getLogger(__name__)


def _with_page(run: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(run)
    def with_page(*args: Any, **kwargs: Any) -> Any:
        try:
            cluster = cluster_of(click.get_current_context().obj.app)
        except ClusterError:
            logger.debug("the app is in no cluster: Flower has no cluster page")
        else:
            _add_page(cluster)
        return run(*args, **kwargs)

    return with_page


def _add_page(cluster: Cluster) -> None:
    """Have the server that this command starts serve the page. Raises ClickException for a wrong setting."""
    try:
        cluster.check()
    except ConfigurationError as exc:
        raise click.ClickException(str(exc)) from exc
    # Flower makes its server of these two; its last handler takes whatever is left.
    urls.handlers[-1:-1] = page_handlers(cluster)
    urls.settings["template_loader"] = Templates(urls.settings["template_path"])


flower.callback = _with_page(flower.callback)
