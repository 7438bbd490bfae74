r"""The name of every Redis key and queue, in one place.

Queues are Kombu lists that Flower, ``celery purge`` and exporters read by name, so under the default cluster
name they carry no prefix. Priorities other than 0 live in sub-lists ``<queue>\x06\x16<step>`` that Kombu's
Redis transport defines.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster_tasks.model import check_node_id, check_request_type

DEFAULT_NAME = "cluster"
PRIORITY_SEPARATOR = "\x06\x16"
PRIORITY_STEPS = (0, 3, 6, 9)
BOUND = ".bound"
"""What follows the name of a node's list in that of its second one, from which no other node takes."""
ANY_TYPE = "any"
"""Request type of a message that declares none; every node serves it."""


@dataclass(frozen=True, slots=True)
class Keys:
    """Key names of one cluster; ``name`` lets two clusters share a Redis."""

    name: str = DEFAULT_NAME

    @property
    def _queue_prefix(self) -> str:
        return "" if self.name == DEFAULT_NAME else f"{self.name}."

    def node_queue(self, node_id: str) -> str:
        """The list of a node. Raises ValueError for an id that could escape its name space."""
        return self.node_prefix + check_node_id(node_id)

    @property
    def node_prefix(self) -> str:
        """What precedes the id of a node in the name of its list."""
        return f"{self._queue_prefix}node."

    def waiting_queue(self, request_type: str) -> str:
        """The list of jobs of one type that have no node."""
        return f"{self._queue_prefix}waiting.{check_request_type(request_type)}"

    def suspect_queue(self, request_type: str) -> str:
        """The waiting list of jobs of one type that were running when a process died."""
        return f"{self._queue_prefix}suspect.{check_request_type(request_type)}"

    @property
    def control_queue(self) -> str:
        """The list that coordinators consume."""
        return f"{self.name}.control"

    @property
    def delayed(self) -> str:
        """Sorted set of jobs whose time has not come, by the second since 1970 when it will. Known as a queue, too."""
        return f"{self.name}.delayed"

    def node_of(self, queue: str) -> str | None:
        """The id of the node one of whose lists ``queue`` is, or None."""
        prefix = self.node_prefix
        return queue[len(prefix) :].removesuffix(BOUND) if queue.startswith(prefix) else None

    def owns(self, queue: str) -> bool:
        """Whether ``queue`` is a list that only this package's scripts may fill."""
        return queue.startswith(tuple(f"{self._queue_prefix}{kind}." for kind in ("node", "waiting", "suspect")))

    def reserves(self, queue: str) -> bool:
        """Whether ``queue`` is the name of a key of the cluster's that is no list of jobs, or can be one's."""
        return queue == self.delayed or queue.startswith(f"{self.name}:")

    # The epoch table. Hashes go from a node's queue name to a value.

    @property
    def epochs(self) -> str:
        """Hash queue → epoch, of every node that may work."""
        return f"{self.name}:epochs"

    @property
    def beats(self) -> str:
        """Hash queue → beat counter."""
        return f"{self.name}:beats"

    @property
    def serves(self) -> str:
        """Hash queue → request types, comma-separated and sorted, with a comma at both ends."""
        return f"{self.name}:serves"

    @property
    def zones(self) -> str:
        """Hash queue → zone, of the nodes that have one. The scripts make its name from that of ``serves``."""
        return f"{self.serves}:zones"

    @property
    def draining(self) -> str:
        """Set of queues on which nothing new is placed."""
        return f"{self.name}:draining"

    @property
    def epoch_counter(self) -> str:
        """Number of epochs ever begun."""
        return f"{self.name}:epoch_counter"

    @property
    def fencing_token(self) -> str:
        """The last fencing token that a delivery was given."""
        return f"{self.name}:fencing_token"

    @property
    def opened(self) -> str:
        """Set of ``<node id>/<epoch>``, of all epochs that were begun and are not forgotten."""
        return f"{self.name}:opened"

    @property
    def fenced(self) -> str:
        """Hash ``<node id>/<epoch>`` → how it ended and what it had, of the epochs whose remains are not yet moved."""
        return f"{self.name}:fenced"

    @property
    def slot_limits(self) -> str:
        """Hash queue → how many jobs a node may hold, and why; of nodes that may not hold what their pool can run."""
        return f"{self.name}:slot_limits"

    def lost(self, node_id: str) -> str:
        """Set while a node that was lost has not come back."""
        return f"{self.name}:lost:{check_node_id(node_id)}"

    @property
    def rebalanced(self) -> str:
        """Set for as long as the agents leave the lists as they are."""
        return f"{self.name}:rebalanced"

    @property
    def optimized(self) -> str:
        """Set for as long as no coordinator sends the job that compacts collections."""
        return f"{self.name}:optimized"

    @property
    def tasks(self) -> str:
        """Hash node queue → names of the tasks that the node knows, one a line."""
        return f"{self.name}:tasks"

    # Jobs.

    @property
    def backlog(self) -> str:
        """Sorted set of node queues by length: the index that lets an idle node find work."""
        return f"{self.name}:backlog"

    @property
    def undecodable(self) -> str:
        """List of messages that are not Kombu messages, kept for inspection."""
        return f"{self.name}:undecodable"

    @property
    def idle(self) -> str:
        """Sorted set of node queues that wait at their doorbell, longest first."""
        return f"{self.name}:idle"

    @property
    def coming(self) -> str:
        """Sorted set of node queues that were rung and have not come yet, by the second since 1970 when that was.

        The scripts make its name from that of ``idle``."""
        return f"{self.idle}:coming"

    @property
    def bell_prefix(self) -> str:
        """What precedes the queue name in the name of a doorbell."""
        return f"{self.name}:bell:"

    def bell(self, node_id: str) -> str:
        """The list a node blocks on; it holds no jobs."""
        return self.bell_prefix + self.node_queue(node_id)

    def unacked(self, node_id: str, epoch: str) -> str:
        """Hash tag → message of what one epoch of a node holds."""
        return f"{self.unacked_prefix}{check_node_id(node_id)}/{epoch}"

    @property
    def unacked_prefix(self) -> str:
        """What precedes node and epoch in the names of these hashes."""
        return f"{self.name}:unacked:"

    def not_started(self, node_id: str, epoch: str) -> str:
        """Set of the tags that an epoch holds and has not begun to work on. All others it is at work on."""
        return f"{self.name}:not_started:{check_node_id(node_id)}/{epoch}"

    def remains(self, node_id: str, epoch: str) -> str:
        """Where a fence puts the list of a node (priority 0; others, and those of its second list, with a suffix)."""
        return f"{self.name}:remains:{check_node_id(node_id)}/{epoch}"

    def remains_unacked(self, node_id: str, epoch: str) -> str:
        """Where a fence puts what the epoch held."""
        return f"{self.name}:remains_unacked:{check_node_id(node_id)}/{epoch}"

    def terminal(self, job_id: str) -> str:
        """Set when a job has ended; holds the tag of the delivery that ended it, how it ended, and its seconds to live.

        Where something follows the end they begin when the delivery is let go.
        """
        return f"{self.name}:terminal:{job_id}"

    def kept_end(self, job_id: str) -> str:
        """The end of a job, as a result is written, for as long as its delivery stands because something follows."""
        return f"{self.name}:kept_end:{job_id}"

    def followed(self, job_id: str) -> str:
        """Set of what has followed a job or a chord: ``<job id>/<attempt>``."""
        return f"{self.name}:followed:{job_id}"

    def hedges(self, node_id: str) -> str:
        """Sorted set of the jobs that a node is to do as well, by the second since 1970 when they are due.

        A script makes the name of another node's from it, by what follows ``:hedges:``.
        """
        return f"{self.name}:hedges:{check_node_id(node_id)}"

    def hedged(self, node_id: str) -> str:
        """Hash job id → message of these."""
        return f"{self.name}:hedged:{check_node_id(node_id)}"

    def durations(self, kind: str) -> str:
        """List of the seconds that the last jobs took which could be hedged, of one kind."""
        return f"{self.name}:durations:{kind}"

    def published(self, producer: str) -> str:
        """Number of the last publish of a producer."""
        return f"{self.name}:published:{producer}"

    def crashes(self, job_id: str) -> str:
        """List of the crash deliveries of a job (JSON), the first one first."""
        return f"{self.name}:crashes:{job_id}"

    def stream(self, job_id: str) -> str:
        """Stream of the text of a job while it runs; its ids are ``<fencing token of the delivery>-<number>``."""
        return f"{self.name}:stream:{job_id}"

    def stream_reader(self, job_id: str) -> str:
        """How far that is read, and a number that the reader changes for as long as he is there."""
        return f"{self.name}:stream_reader:{job_id}"

    @property
    def suspects_held(self) -> str:
        """Hash node queue → tag of the suspect that the node was given last."""
        return f"{self.name}:suspects_held"

    @property
    def quarantine(self) -> str:
        """Hash job id → record (JSON) of a job that is not run any more."""
        return f"{self.name}:quarantine"

    @property
    def quarantined(self) -> str:
        """Sorted set of the job ids in quarantine, by the second since 1970 when each came."""
        return f"{self.name}:quarantined"

    @property
    def revoked(self) -> str:
        """Sorted set of revoked job ids, by the second since 1970; who is revoked later has a later one."""
        return f"{self.name}:revoked"

    @property
    def revoked_stamps(self) -> str:
        """Set of ``[header, value]`` (JSON) whose jobs are revoked."""
        return f"{self.name}:revoked_stamps"

    # Registry and watch.

    @property
    def nodes(self) -> str:
        """Hash node id → record (JSON), of the Redis registry."""
        return f"{self.name}:nodes"

    @property
    def loads(self) -> str:
        """Hash node id → load (JSON), of the Redis registry."""
        return f"{self.name}:loads"

    @property
    def node_events(self) -> str:
        """Stream of joined, left and updated, of the Redis registry."""
        return f"{self.name}:node_events"

    @property
    def events(self) -> str:
        """Stream of what people want to know: nodes lost, jobs moved."""
        return f"{self.name}:events"

    def condition(self, name: str) -> str:
        """Set while something lasts that all observers see, so that it is told once."""
        return f"{self.name}:condition:{name}"

    @property
    def checks(self) -> str:
        """Number of health checks that coordinators have run."""
        return f"{self.name}:checks"

    @property
    def watchers(self) -> str:
        """Nodes that observe all others, by when their seats end."""
        return f"{self.name}:watchers"

    def queued_control(self, task_name: str) -> str:
        """The last control task of that name, as queued: one that waits is enough."""
        return f"{self.name}:queued:{task_name}"

    # Providers of models, by their name.

    def breaker(self, provider: str) -> str:
        """State (JSON) of the breaker of a provider."""
        return f"{self.name}:breaker:{provider}"

    def limits(self, provider: str) -> str:
        """List (JSON) of what a provider was asked in each second of the last minute."""
        return f"{self.name}:limits:{provider}"

    # The cache, which may live in another Redis. Braces: what concerns one key is in one slot of a Redis Cluster.

    def cache_entry(self, namespace: str, key: str) -> str:
        """A value of the cache."""
        return f"{self.name}:cache:{{{namespace}:{key}}}"

    def cache_lease(self, namespace: str, key: str) -> str:
        """Token of whoever computes that value."""
        return f"{self.name}:cache:{{{namespace}:{key}}}:lease"

    def cache_state(self, namespace: str) -> str:
        """Hash of the generation of a namespace and its last change."""
        return f"{self.name}:cache_state:{namespace}"

    @property
    def cache_changes(self) -> str:
        """Channel on which changes of cached values are told."""
        return f"{self.name}:cache_changes"

    def cache_hot(self, node_id: str, period: int) -> str:
        """Sorted set of the keys that a node, or with "" all, hit in a period of time, by how often."""
        return f"{self.name}:cache_hot:{node_id}:{period}"

    @property
    def cache_counters(self) -> str:
        """Hash of what all processes have counted of the cache."""
        return f"{self.name}:cache_counters"

    # Locks, where they live in Redis.

    def lock(self, quoted_name: str) -> str:
        """Token of whoever holds the lock; ``locks.base.check_name`` has quoted its name."""
        return f"{self.name}:lock:{quoted_name}"

    @property
    def lock_token(self) -> str:
        """The last token that any lock was given. It never expires."""
        return f"{self.name}:lock_token"

    # Shards.

    @property
    def collections(self) -> str:
        """Hash collection → its generation and how many shards it has, as those have told who can read the store."""
        return f"{self.name}:collections"

    @property
    def shards(self) -> str:
        """Hash collection → generation and holders of its shards (JSON): the assignment."""
        return f"{self.name}:shards"

    @property
    def shards_version(self) -> str:
        """Version of the assignment, compared for equality only."""
        return f"{self.name}:shards_version"

    def shards_ready(self, collection: str) -> str:
        """Hash ``<generation>/<shard>/<node id>`` → epoch in which that node had the shard in its memory."""
        return f"{self.name}:shards_ready:{collection}"

    def shards_turn(self, duty: str) -> str:
        """Set for as long as nobody else is to do that for the shards."""
        return f"{self.name}:shards_turn:{duty}"

    @property
    def counters(self) -> str:
        """Hash of counters: ``stale_commits``, and ``hedges`` that were given."""
        return f"{self.name}:counters"

    @property
    def job_counts(self) -> str:
        """Hash ``<request type> <what> …`` → number: how the jobs of all nodes ended; see ``metrics.counts``."""
        return f"{self.name}:job_counts"

    def node_counts(self, node_id: str) -> str:
        """The same of one node, with what it holds and the last batch that it told."""
        return f"{self.name}:node_counts:{check_node_id(node_id)}"

    @property
    def provider_counts(self) -> str:
        """Hash ``<outcome> <provider>`` → number of requests."""
        return f"{self.name}:provider_counts"


def node_suffixes() -> tuple[str, ...]:
    """Return what follows the name of a node's list in those of all its lists, both kinds and every priority."""
    return (*priority_suffixes(), *(BOUND + suffix for suffix in priority_suffixes()))


def priority_suffixes(steps: tuple[int, ...] = PRIORITY_STEPS, separator: str = PRIORITY_SEPARATOR) -> tuple[str, ...]:
    """Return what follows a queue name for each priority step, the most urgent first."""
    return tuple(f"{separator}{step}" if step else "" for step in steps)
