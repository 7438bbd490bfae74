"""Why jobs are not done, in words. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from cluster_tasks.keys import ANY_TYPE, BOUND, Keys
from cluster_tasks.model import Node, NodeStatus

WORKING = (NodeStatus.ONLINE, NodeStatus.BUSY)
"""Statuses of nodes that take jobs."""


def problems(
    keys: Keys, working: Sequence[Node], coordinators: Sequence[Node], lists: Mapping[str, int]
) -> Iterator[str]:
    """Yield what keeps the jobs in ``lists`` from being run by the nodes that are ``working``, a sentence each."""
    if not working:
        yield "no worker node is online"
    lists_of = keys.waiting_queue, keys.suspect_queue
    served = {queue(name) for node in working for name in (*node.serves, ANY_TYPE) for queue in lists_of}
    for queue in sorted(lists):
        if keys.node_of(queue) is None and queue not in served:
            yield f"jobs wait in {queue}, and no node that is online serves them"
    # From the other list of a coordinator nodes take.
    for queue in sorted(lists.keys() & {keys.node_queue(node.id) + BOUND for node in coordinators}):
        yield f"jobs wait in {queue}, and that node runs none"
