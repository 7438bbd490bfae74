"""The node agent: registers a node, beats for it, reports its load, watches the others, and leaves."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from celery.worker import state

from cluster_tasks.broker.deliveries import Deliveries
from cluster_tasks.broker.epochs import Beat, Predecessor, Pulse, Standing
from cluster_tasks.broker.placement import Crash
from cluster_tasks.cluster import Cluster
from cluster_tasks.errors import BrokerUnavailable, NodeNameTaken, NodeNotFound
from cluster_tasks.metrics.counts import Teller
from cluster_tasks.model import Load, Node, NodeStatus
from cluster_tasks.redis_store import foreign_errors
from workers.counting import counts
from workers.executions import Executions
from workers.heartbeat import HeartbeatProcess
from workers.load import outcomes
from workers.periodic import Periodic

logger = logging.getLogger(__name__)

SURE_SHARE = 0.8
"""Of the lease: for so long after a beat was sent, nobody can have given this node's jobs to others."""
UNCOORDINATED_S = 10.0
"""After so long it is worth an alert: a restart of the coordinator is none."""
RESYNC_S = 10.0
ASK_EVERY_S = 10.0
"""So often a node asks for a seat among those who observe although all are taken: their clocks may be wrong."""
RELEARN_EVERY_S = 3600.0
"""So often it reads all revocations, and not the new ones only."""
PRUNE_EVERY_S = 60.0
ALARM_EVERY_S = 0.25
"""Where jobs fail on all nodes, alarms never end."""
REAP_EVERY_S = 20.0
"""So often it looks for nodes in the registry that are no more."""
KNOWN_WITHIN_S = 2.0
"""So long a node that starts waits for the registry to know it. Then it works, known or not."""
UNCHECKED_S = 1.0
"""After so long without a health check by a coordinator, the agents act on what they see."""


class NodeAgent:
    """Keeps one node alive in the eyes of the cluster. ``deliveries`` is None for a coordinator: it takes no jobs."""

    def __init__(
        self,
        cluster: Cluster,
        node: Node,
        deliveries: Deliveries | None,
        measure: Callable[[], Load],
        helper: HeartbeatProcess | None = None,
        executions: Executions | None = None,
    ) -> None:
        """``helper`` beats as well, for a pool that can hold the GIL of this process.

        ``executions`` are what the pool of this node runs; a coordinator has none.
        """
        self._helper, self._executions = helper, executions
        self._cluster, self._node, self._deliveries, self._measure = cluster, node, deliveries, measure
        self._settings = cluster.settings
        self.beats = 0
        """How often it has tried to beat."""
        self._kills = cluster.settings.on_fenced == "kill"
        self._standing, self._is_leaving = Standing.OK, False
        self._abandoned: set[str] = set()
        """What runs here and others have been given."""
        self._checks = (-1, 0.0)
        self._looked_s = float("-inf")
        self._pulse, self._known_revoked = Pulse(Standing.OK), ""
        self._observes = False
        self._wants_its_share = False
        self._registered = ""
        """The epoch under which the registry was told of this node."""
        self._has_reported = threading.Event()
        self._resynced_s = self._reaped_s = cluster.clock.monotonic()
        self._revoked_since_s, self._relearn_s = 0.0, 0.0
        self._alarmed, self._alarmed_s = threading.Event(), float("-inf")
        self._load_report = Periodic("load report", self._settings.heartbeat_s, self._report)
        self._uncoordinated = cluster.events.condition("no coordinator", "coordinator back")
        # Where a coordinator is at work, it sends; else whoever comes first.
        self._alerts = cluster.alert_sender(lambda: deliveries is None or self._is_unchecked())
        self._duties = [
            Periodic("heartbeat", self._settings.heartbeat_s, self._beat),
            self._load_report,
            Periodic("watch", self._settings.health_check_s, self._watch),
        ]
        self._duties.append(Periodic("pruning", PRUNE_EVERY_S, cluster.quarantine.prune))
        if self._settings.ejection:
            self._duties.append(Periodic("ejection", self._settings.health_check_s, self._judge))
        # On a thread of its own: neither how long it takes nor its failure is any matter to those who watch.
        self._duties.append(Periodic("shards", self._settings.heartbeat_s, self._plan_shards))
        self._teller = Teller(cluster.client, cluster.keys, node.id, counts)
        if executions is not None:
            self._duties.append(Periodic("counts", self._settings.heartbeat_s, self._tell_counts))
        if deliveries is not None:
            outcomes.alarm = self._alarm
            self._revocations = Periodic("revocations", RELEARN_EVERY_S, self._learn_revocations)
            self._duties.append(self._revocations)
            if self._settings.auto_rebalance:
                self._duties.append(Periodic("rebalance", self._settings.heartbeat_s, self._rebalance))

    @property
    def node(self) -> Node:
        """The node as registered; its epoch is empty before ``start``."""
        return self._node

    def start(self) -> None:
        """Join the cluster. Raises NodeNameTaken if a node of this name lives, BrokerUnavailable."""
        if self._helper is not None:
            self._helper.start()
        if self._deliveries is not None:
            # Before a job is fetched; of what is revoked from here on the first beat tells.
            self._learn_revocations()
        self._begin(*self._open())
        for duty in self._duties:
            duty.start()
        if self._alerts is not None:
            self._alerts.start()
        self._has_reported.wait(KNOWN_WITHIN_S)

    def drain(self) -> None:
        """Take no new jobs, and hand over the list; what is held goes on. Safe to repeat."""
        if not self._node.epoch:
            return
        self._standing = Standing.DRAINING
        try:
            # By epoch: the name may belong to a successor by now.
            self._cluster.drain(self._node.id, self._node.epoch)
        except NodeNotFound:
            logger.warning("this node was fenced: others have its list already")

    def hand_back(self) -> bool:
        """Give others what this node still holds, uncharged, and stop it here; return whether nothing runs any more.

        Raises BrokerUnavailable.
        """
        if self._deliveries is None or not self._deliveries.held():
            return True
        if epoch := self._node.epoch:
            moved = self._cluster.draining.hand_back(self._node.id, epoch)
            logger.warning("%d jobs have not ended in time and are handed back", moved.held)
        return self._stop_taken(kill=True)

    def give_up(self, reason: str) -> None:
        """Leave at once, because this worker is stuck: others get all jobs. Raises UnavailableError.

        Only the job whose message the event loop was at, if any, is charged: it would hold up the next node as well.
        """
        # The heartbeat goes on until the process ends: it must not join anew, and be given jobs that die with it.
        self._is_leaving = True
        node_id, epoch = self._node.id, self._node.epoch
        self._cluster.events.add("node stuck", node=node_id, epoch=epoch, reason=reason)
        if self._deliveries is not None and self._executions is not None:
            at_work = self._executions.tags()
            culprits = [tag for tag in self._deliveries.delivered() if tag not in at_work]
            crash = Crash(node_id, epoch, reason, self._cluster.clock.time())
            self._cluster.evacuation.hand_back(node_id, epoch, crash, culprits)
        self._cluster.health.retire(node_id, epoch)

    def stop(self, *, in_good_order: bool = True) -> None:
        """Leave: end the epoch, give back what is still held, uncharged. Safe to repeat, and before ``start``.

        Not in good order: fall silent, so that the others take it for the death that it is, and charge what it held.
        """
        self._is_leaving = True
        heartbeat, *others = self._duties
        for duty in others:
            duty.stop()
        try:
            # Under its heartbeat still: to wait for what else is to be stopped can take longer than a lease.
            self._give_back(in_good_order)
        finally:
            heartbeat.stop()
            if self._helper is not None:
                self._helper.stop()
            if self._alerts is not None:
                self._alerts.stop()
        # The heartbeat may have found itself fenced, and have begun another epoch, just before.
        self._give_back(in_good_order)
        if self.beats:
            self._tell_counts()

    def _give_back(self, in_good_order: bool) -> None:
        epoch, self._node = self._node.epoch, self._node.model_copy(update={"epoch": ""})
        if not epoch:
            return
        if self._deliveries is not None:
            self._deliveries.flush()
        if in_good_order:
            self._cluster.health.retire(self._node.id, epoch)

    def _open(self) -> tuple[str, float]:
        """Return a new epoch, and when it was asked for."""
        node = self._node
        while True:
            asked_at_s = self._cluster.clock.monotonic()
            opened = self._open_epoch()
            if not isinstance(opened, Predecessor):
                return opened, asked_at_s
            logger.warning("waiting whether an earlier %s still lives", node.id)
            self._wait_for_silence(opened.beat)
            self._cluster.health.fail_over(node.id, opened.beat, self._settings.lease_s)

    def _open_epoch(self) -> str | Predecessor:
        # A coordinator runs none of the tasks that it knows.
        tasks = () if self._deliveries is None else self._cluster.app.tasks
        node = self._node
        return self._cluster.epochs.open(node.id, node.serves, tasks, self._settings.recovery_threshold, node.zone)

    def _wait_for_silence(self, seen: Beat) -> None:
        """Wait for a lease without a beat of a predecessor. Raises NodeNameTaken if it beats."""
        clock = self._cluster.clock
        until_s = clock.monotonic() + self._settings.lease_s
        while clock.monotonic() < until_s:
            time.sleep(self._settings.heartbeat_s / 4)
            beat = self._cluster.epochs.beats().get(self._node.id)
            if beat is None:
                return
            if beat != seen:
                raise NodeNameTaken(
                    f"a node {self._node.id!r} is alive; give this worker another name with -n, such as -n NAME2@%h"
                )

    def _begin(self, epoch: str, asked_at_s: float) -> None:
        self._node = self._node.model_copy(update={"epoch": epoch, "registered_at": self._cluster.clock.time()})
        self._standing, self._wants_its_share = Standing.OK, True
        if self._deliveries is not None:
            self._deliveries.begin(epoch)
            self._deliveries.renew(asked_at_s + SURE_SHARE * self._settings.lease_s)
        if self._helper is not None:
            self._helper.beat_for(epoch)
        # It registers this node. Not here: a registry may be silent for longer than a lease, and no beat was sent yet.
        self._load_report.hurry()

    def _stop_taken(self, *, kill: bool) -> bool:
        """Stop what others have been given; return whether nothing of it runs any more. Raises BrokerUnavailable."""
        if self._deliveries is None or self._executions is None:
            return True
        with foreign_errors(BrokerUnavailable, "looking for what others have been given"):
            taken = self._deliveries.disown()
        fresh, self._abandoned = taken - self._abandoned, taken
        stopped = self._executions.stop(fresh) if kill else 0
        if fresh:
            how = "stopped" if stopped else "not committed"
            logger.warning("%d running jobs were given to others; here they are %s", len(fresh), how)
        return not taken or (kill and self._executions.can_stop)

    def _beat(self) -> None:
        self.beats += 1
        was_draining = self._standing is Standing.DRAINING
        # Stamp before the call: a slow reply must shorten the time that is sure, never stretch it.
        sent_at_s = self._cluster.clock.monotonic()
        at_bell = self._deliveries is not None and self._deliveries.at_bell
        try:
            self._pulse = self._cluster.epochs.beat(self._node.id, self._node.epoch, at_bell=at_bell)
        except BrokerUnavailable:
            # A Redis that can be read and not written stops all beats, and no node is dead.
            self._cluster.health.interrupted()
            raise
        self._standing = self._pulse.standing
        if self._standing is not Standing.OK:
            self._stop_taken(kill=self._kills)
        if self._standing is Standing.FENCED:
            # One that leaves is sure of nothing any more.
            if not self._is_leaving:
                self._rejoin()
                if was_draining:
                    self._go_on_draining()
        elif self._deliveries is not None:
            was_late = self._deliveries.renew(sent_at_s + SURE_SHARE * self._settings.lease_s)
            if was_late or sent_at_s - self._resynced_s > RESYNC_S:
                self._resync(sent_at_s)
        if self._helper is not None and self._node.epoch and not self._is_leaving:
            self._helper.revive(self._node.epoch)
        if self._deliveries is not None:
            self._deliveries.flush()
            if self._pulse.revoked != self._known_revoked:
                self._revocations.hurry()

    def _resync(self, now_s: float) -> None:
        assert self._deliveries is not None
        with foreign_errors(BrokerUnavailable, "reading what this node holds"):
            again = self._deliveries.resync()
        self._resynced_s = now_s
        self._stop_taken(kill=self._kills)
        if again:
            logger.warning("%d jobs that this node had let lie are delivered again", again)

    def _rejoin(self) -> None:
        logger.error("this node was fenced: what it runs will not be committed; it joins anew")
        asked_at_s = self._cluster.clock.monotonic()
        opened = self._open_epoch()
        if isinstance(opened, Predecessor):
            logger.error("another worker has taken the name %s: this one takes no more jobs", self._node.id)
            return
        self._begin(opened, asked_at_s)
        logger.warning("node %s has joined anew", self._node.id)

    def _go_on_draining(self) -> None:
        self._standing = Standing.DRAINING
        # The registry learns it by the load report: a heartbeat must not wait for it. Not found: fenced once more.
        with suppress(NodeNotFound):
            self._cluster.epochs.set_draining(self._node.id, True, self._node.epoch)
            self._cluster.evacuation.hand_over(self._node.id)

    def _learn_revocations(self) -> None:
        # Broadcasts are lost on a node that joins or reconnects just then, and Celery forgets them after three hours.
        seen = self._pulse.revoked
        if (now_s := self._cluster.clock.monotonic()) >= self._relearn_s:
            self._revoked_since_s, self._relearn_s = 0.0, now_s + RELEARN_EVERY_S
        ids, stamps = self._cluster.revocations.since(self._revoked_since_s)
        state.merge_revoked([job_id for job_id in ids if job_id not in state.revoked])
        state.revoked_stamps.update(stamps)
        self._revoked_since_s = max(ids.values(), default=self._revoked_since_s)
        self._known_revoked = seen

    def _report(self) -> None:
        try:
            self._make_known(self._node.model_copy(update={"load": self._measure(), "status": self._status()}))
        finally:
            self._has_reported.set()
        self._cluster.health.tell_registry()
        if self._alarmed.is_set():
            self._alarmed.clear()
            self._cluster.eject_outliers(at_once=True)
        # Each who looks reads all nodes: all of them would read n².
        may_reap = self._deliveries is None or self._observes
        if may_reap and (now_s := self._cluster.clock.monotonic()) - self._reaped_s > REAP_EVERY_S:
            self._reaped_s = now_s
            self._cluster.health.reap()

    def _tell_counts(self) -> None:
        if self._executions is not None:
            held = {**dict.fromkeys(self._node.serves, 0), **self._executions.by_type()}
            self._teller.tell(held, self._cluster.clock.monotonic())

    def _make_known(self, node: Node) -> None:
        # A record of an earlier epoch would take the report for its own.
        if node.epoch == self._registered:
            try:
                self._cluster.registry.beat(node.id, node.load, node.status)
                return
            except NodeNotFound:
                pass
        self._cluster.registry.register(node)
        if node.epoch != self._registered:
            self._cluster.events.add("node joined", node=node.id, epoch=node.epoch)
        self._registered = node.epoch

    def _alarm(self) -> None:
        # A node whose jobs fail at once has fetched hundreds more before the next check.
        now_s = self._cluster.clock.monotonic()
        if now_s - self._alarmed_s >= ALARM_EVERY_S:
            self._alarmed_s = now_s
            self._alarmed.set()
            self._load_report.hurry()

    def _status(self) -> NodeStatus:
        if self._standing is Standing.DRAINING:
            return NodeStatus.DRAINING
        if self._deliveries is not None and self._deliveries.free_slots() <= 0:
            return NodeStatus.BUSY
        return NodeStatus.ONLINE

    def _watch(self) -> None:
        # Of the registry nothing is asked here: while it is silent, who waits for it observes nobody.
        health, now_s = self._cluster.health, self._cluster.clock.monotonic()
        is_full = self._pulse.observers >= self._cluster.watchers.seats
        if is_full and not self._observes and now_s - self._looked_s < ASK_EVERY_S:
            return
        try:
            self._observes, checks = self._cluster.watchers.take_seat(self._node.id)
        except BrokerUnavailable:
            health.interrupted()
            raise
        silent = health.observe() if self._observes else []
        now_s = self._cluster.clock.monotonic()
        if checks != self._checks[0]:
            self._uncoordinated.is_over()
        # Who could not look for a while does not know that nobody checked meanwhile.
        if checks != self._checks[0] or now_s - self._looked_s > 2 * self._settings.health_check_s + UNCHECKED_S:
            self._checks = (checks, now_s)
        self._looked_s = now_s
        if self._is_unchecked():
            health.act(silent)
        if self._is_unchecked(UNCOORDINATED_S):
            self._uncoordinated.holds()

    def _judge(self) -> None:
        if self._deliveries is None or self._is_unchecked():
            self._cluster.eject_outliers()

    def _is_unchecked(self, for_s: float = UNCHECKED_S) -> bool:
        """Whether no coordinator is at work, as far as this process has looked: one of the few that observe."""
        return self._observes and self._cluster.clock.monotonic() - self._checks[1] >= for_s

    def _plan_shards(self) -> None:
        if self._deliveries is None or self._is_unchecked():
            self._cluster.plan_shards_in_turn()

    def _rebalance(self) -> None:
        if self._wants_its_share:
            is_known = self._registered == self._node.epoch
            if is_known and self._cluster.epochs.lists().may_get(self._cluster.keys.node_queue(self._node.id)):
                self._wants_its_share = False
                self._cluster.rebalance()
        elif self._is_unchecked():
            self._cluster.rebalance_in_turn()
