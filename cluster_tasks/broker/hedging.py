"""A job that takes long is given to a second node as well, and whichever ends it first has ended it.

The producer names that node and a time, and the message is kept for it beside its lists. The commit of the job takes
it back, so what ends in time costs no more than that. Once the time has passed, the node is given the message when it
finds no other work. Then no list that it takes from holds the job: somebody is at it. From there on both are deliveries
of one job: the first commit counts, the other one is refused, and to lose is no failure.

It is for jobs that may run twice at once and that nothing follows but the count of their chord: what is published
before the end, as links and steps of chains are, could come once from each. And it is for spare time only: a cluster
that is busy gives no hedges.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Self

from cluster_tasks.model import check_node_id

HEDGE_PROPERTY = "cluster_hedge"
"""Where a message says how it is hedged; see Hedge. It stays there: who ends the job must know."""
REMEMBERED_S = 24 * 3600
"""How long it is remembered that a job has ended which two nodes were given: the other may be stopped for so long."""
DURATIONS = 100
"""How many are kept of a kind of jobs."""
DURATIONS_LIVE_S = 3600


class Hedge(NamedTuple):
    """Who is to do a job as well, and when."""

    node_id: str
    after_s: float
    """Since the job was published."""
    kind: str
    """Of what jobs the durations are kept together."""

    @classmethod
    def of(cls, properties: dict[str, Any] | None) -> Self | None:
        """Read it from the properties of a message or of a task's request; None if the job is not hedged."""
        match (properties or {}).get(HEDGE_PROPERTY):
            # In a message from elsewhere it may be anything.
            case [str() as node_id, int() | float() as after_s, str() as kind] if 0 < after_s < float("inf"):
                try:
                    kind.encode()
                    return cls(check_node_id(node_id), float(after_s), kind)
                except ValueError:
                    return None
        return None
