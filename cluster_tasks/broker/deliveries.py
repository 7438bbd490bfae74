"""What this process holds as a node: every delivery from fetch to acknowledgement.

An acknowledgement belongs to (node, epoch, tag) and not to a channel: it is kept here, sent with the next fetch or
by a client of the process, and kept until Redis has taken it. So it works after a reconnect and on a closed channel.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence, Set
from dataclasses import dataclass, replace
from math import inf
from typing import Any

import redis

from cluster_tasks.broker.members import split
from cluster_tasks.broker.message import Delivery, Placement, job_of, place_message, replace_message
from cluster_tasks.broker.placement import Crash, Placer, Why
from cluster_tasks.broker.sequels import parse_attempt
from cluster_tasks.clock import Clock
from cluster_tasks.keys import ANY_TYPE, Keys
from cluster_tasks.redis_store import text

logger = logging.getLogger(__name__)

TRACEBACK = 4_000
"""Characters of a traceback that are kept."""


@dataclass(frozen=True, slots=True)
class Past:
    """What has become of a job in earlier deliveries."""

    ended: bool
    crashes: Sequence[Crash]
    revoked: bool
    attempts: Sequence[tuple[int, int]]
    """Those that were published as its retry or replacement."""


class Deliveries:
    """The register of one node process. Thread-safe: pool threads acknowledge, the event loop fetches."""

    def __init__(
        self, node_id: str, serves: Iterable[str], keys: Keys, client: redis.Redis, clock: Clock,
        slots: Callable[[], int],
    ) -> None:  # fmt: skip
        self.node_id, self.queue, self.bell = node_id, keys.node_queue(node_id), keys.bell(node_id)
        types = sorted({*serves, ANY_TYPE})
        self.waiting = [keys.waiting_queue(request_type) for request_type in types]
        """The waiting lists that this node takes from."""
        self.suspects = [keys.suspect_queue(request_type) for request_type in types]
        """Those of suspects, in the same order."""
        self.epoch = ""
        self.at_bell = False
        """Whether the node waits at its doorbell: then no fetch will carry an acknowledgement soon."""
        self.wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        """Becomes readable when a slot was freed, maybe by another thread."""
        self._keys, self._client, self._clock, self._slots = keys, client, clock, slots
        self.loop_thread = 0
        """The thread of the event loop, which looks for work before it sleeps: by itself it need not be woken."""
        self._placer = Placer(client, keys)
        self.admit: Callable[[Delivery, dict[str, Any]], bool] = lambda delivery, payload: True
        """Asked before a message is read that was delivered before; False: it is dealt with, and not to be read."""
        self.all_read: Callable[[], None] = lambda: None
        """Called when all that a fetch gave has been read."""
        self._lock = threading.Lock()
        self._held: dict[str, bytes] = {}
        self._beside: set[str] = set()
        """What is held in the place of another job, with which it is to be done in one call."""
        self._inbox: deque[tuple[str, bytes, bool]] = deque()
        self._acked: dict[str, str] = {}
        """Tag → id of the job, of what Redis has not been told to let go."""
        self._returned: dict[str, tuple[Placement, Crash | None]] = {}
        self._unreadable: dict[str, bytes] = {}
        self._blamed: dict[str, Crash] = {}
        self._run_in_vain: set[str] = set()
        """Tags of what has run here, and whose end could not be stored."""
        self._held_back: set[str] = set()
        self._taken_up: set[str] = set()
        """What was held back, and of which Redis has not been told that it is no more."""
        self._taken: Set[str] = frozenset()
        self._fetches = 0
        self.trial = ""
        """The trial under which this node is given jobs; empty: none."""
        self._trial_since = 0
        """The fetch from which on jobs belong to it."""
        self._answered = 0
        """The last fetch whose answer has come, or never will."""
        self._sure_until_s = float("-inf")

    @property
    def unacked_key(self) -> str:
        """The hash in Redis of what this epoch holds."""
        return self.unacked_of(self.epoch)

    @property
    def _not_started(self) -> str:
        return self._keys.not_started(self.node_id, self.epoch)

    def unacked_of(self, epoch: str) -> str:
        """The hash in Redis of what an epoch of this node holds."""
        return self._keys.unacked(self.node_id, epoch)

    def begin(self, epoch: str) -> None:
        """Work under a new epoch. What the old one holds still fills its slots until it ends, and is not committed."""
        with self._lock:
            self.epoch, self.trial, self._trial_since = epoch, "", self._fetches
            for tag, *_ in self._inbox:
                self._drop(tag)
            self._inbox.clear()
            self._acked.clear()
            self._returned.clear()
            self._unreadable.clear()
            self._blamed.clear()
            self._run_in_vain.clear()
            self._held_back.clear()
            self._taken_up.clear()
        self.wake()

    def renew(self, until_s: float) -> bool:
        """Let jobs start until ``until_s`` on the clock; return whether none could any more before."""
        was_late = not self.is_sure()
        self._sure_until_s = until_s
        if was_late:
            self.wake()
        return was_late

    def is_sure(self) -> bool:
        """Whether it is sure that nobody has given the jobs of this node to others yet."""
        return self._clock.monotonic() < self._sure_until_s

    def may_start(self, tag: str) -> bool:
        """Whether work on a delivery may begin."""
        return self.is_sure() and tag in self._held and self._is_current(tag)

    def free_slots(self) -> int:
        """How many more jobs may be fetched now, each with those that are done with it."""
        return self._slots() - len(self._held) + len(self._beside) if self.epoch and self.is_sure() else 0

    def held(self) -> int:
        """How many jobs this process holds, of all epochs."""
        return len(self._held)

    @property
    def fetches_answered(self) -> int:
        """Grows with every fetch that was answered."""
        return self._answered

    def delivered(self) -> list[str]:
        """The tags of what a consumer has been given and this process still holds."""
        with self._lock:
            return [tag for tag in self._held if tag not in {waiting for waiting, *_ in self._inbox}]

    def undelivered(self) -> bool:
        """Whether a job that this process holds has not been seen by a consumer."""
        return bool(self._inbox)

    def next_fetch(self) -> tuple[str, str, dict[str, str]]:
        """Return epoch, first part of the tags, and what is acknowledged, all for the fetch that comes now.

        The last are the ids of jobs by tag.

        They are read together: the agent may begin a new epoch at any time.
        """
        with self._lock:
            self._fetches += 1
            # Random through the epoch: a Redis that lost its last second must not see a tag twice.
            return self.epoch, f"{self.epoch}.{self._fetches}.", dict(self._acked)

    def receive(
        self, deliveries: Collection[tuple[str, bytes]], acked: Collection[str], trial: str = "",
        beside: Collection[str] = (),
    ) -> None:  # fmt: skip
        """Take what a fetch returned; ``acked`` went with it. What an epoch was given that has ended is others'.

        ``beside`` are the tags of what is in the place of the delivery before it.
        """
        with self._lock:
            if trial != self.trial:
                self.trial, self._trial_since = trial, self._fetches
            self._answered = self._fetches
            self._forget_acked(acked)
            fresh = [(tag, message) for tag, message in deliveries if self._is_current(tag) and tag not in self._held]
            self._held.update(fresh)
            self._beside.update(tag for tag, _ in fresh if tag in beside)
            self._inbox.extend((tag, message, False) for tag, message in fresh)

    def next(self) -> tuple[Delivery, bytes, bool] | None:
        """Return a delivery that no consumer has seen yet, its message, and whether this node had it before."""
        with self._lock:
            while self._inbox:
                tag, message, again = self._inbox.popleft()
                # One that was to be delivered again may have come to its end meanwhile.
                if tag in self._held:
                    return Delivery(self.node_id, self.epoch, tag), message, again
            return None

    def is_of_trial(self, tag: str) -> bool:
        """Whether a delivery was given under the trial of now, or, without one, since the last."""
        return self._is_current(tag) and _fetch_of(tag) >= self._trial_since

    def is_beside(self, tag: str) -> bool:
        """Whether a delivery is held in the place of another."""
        return tag in self._beside

    def put_beside(self, tag: str) -> None:
        """Let a delivery share the place of another, with which it is done."""
        with self._lock:
            if tag in self._held:
                self._beside.add(tag)
        self.wake()

    def put_alone(self, tag: str) -> None:
        """Let a delivery fill a place of its own."""
        with self._lock:
            self._beside.discard(tag)

    def _drop(self, tag: str) -> bytes | None:
        self._beside.discard(tag)
        return self._held.pop(tag, None)

    def holds(self, tag: str) -> bool:
        """Whether this process holds the delivery, under whatever epoch."""
        return tag in self._held

    def ack(self, tag: str) -> None:
        """Let go of a delivery that is done. Never raises for an outage: the acknowledgement is kept."""
        with self._lock:
            known = self._drop(tag)
            self._blamed.pop(tag, None)
            self._run_in_vain.discard(tag)
            self._release(tag)
            if known is not None and self._is_current(tag):
                self._acked[tag] = job_of(known)
        if threading.get_ident() != self.loop_thread:
            self.wake()
        if self.at_bell:
            self.flush()

    def blame(self, tag: str, reason: str, traceback: str = "", *, shared: bool = False) -> None:
        """Charge a job with the death of its process when it is given back. ``shared``: others were at work with it."""
        crash = Crash(self.node_id, self.epoch, reason, self._clock.time(), traceback[-TRACEBACK:], shared=shared)
        with self._lock:
            self._blamed[tag] = crash

    def requeue(self, tag: str, queue: str = "", *, interrupted: bool = False) -> None:
        """Give a delivery back, to be placed anew in front of the others, or on the list ``queue`` of a node.

        ``interrupted``: its job may have begun. Never raises for an outage.
        """
        with self._lock:
            message, crash = self._drop(tag), self._blamed.pop(tag, None)
            self._held_back.discard(tag)  # The script that moves it looks at that itself.
            if message is not None and self._is_current(tag):
                try:
                    placement = replace_message(
                        message, self._keys, delivered=True, interrupted=interrupted, queue=queue
                    )
                    self._returned[tag] = placement, crash
                except ValueError:
                    # It could be read where the stack was lower.
                    self._unreadable[tag] = message
        self.wake()
        self.flush()

    def split(self, tag: str, message_id: str, crash: Crash | None, most: int = 0) -> int:
        """Have the members of a message that have not ended go on by themselves, charged with ``crash``.

        Returns how many do. Raises ValueError if the message cannot be read, as if it has more than ``most`` bytes
        when it is unpacked, redis.RedisError.
        """
        keys, unacked = self._keys, self.unacked_key
        singles = [place_message(single, json.dumps(single), keys) for single in split(self._held[tag], most)]
        shared = crash and replace(crash, shared=True)
        placed = self._placer.split(unacked, self._not_started, tag, keys.crashes(message_id), singles, shared)
        with self._lock:
            self._drop(tag)
            self._held_back.discard(tag)
        self.wake()
        return placed

    def let_lie(self, tag: str, *, has_run: bool = False) -> None:
        """Forget a delivery that cannot be worked on now: if it is still ours, ``resync`` delivers it again.

        ``has_run``: its job has, and its end could not be stored.
        """
        with self._lock:
            self._drop(tag)
            if has_run:
                self._run_in_vain.add(tag)
        self.wake()

    def has_run(self, tag: str) -> bool:
        """Whether the job of a delivery has run here, and its end could not be stored."""
        return tag in self._run_in_vain

    def hold_back(self, *tags: str) -> None:
        """Say that deliveries are not worked on yet, so that the death of this node is not their fault."""
        with self._lock:
            self._held_back.update(tags)
            self._taken_up.difference_update(tags)
        try:
            self._placer.hold_back(self.unacked_key, self._not_started, tags)
        except redis.RedisError as exc:
            # At worst a job is charged with a crash that is not its own; no single one convicts.
            logger.debug("it is not noted what is held back", extra={"error": repr(exc)})

    def hold_back_undelivered(self) -> None:
        """Hold back what no consumer has seen yet, until each of it begins: what comes now may end this node."""
        if tags := [tag for tag, *_ in self._inbox]:
            self.hold_back(*tags)

    def take_up(self, tag: str) -> None:
        """Say that work on a delivery begins that may have been held back. Never raises for an outage."""
        with self._lock:
            was_held_back = self._release(tag)
        if was_held_back:
            self.flush()

    def _release(self, tag: str) -> bool:
        if tag not in self._held_back:
            return False
        self._held_back.remove(tag)
        self._taken_up.add(tag)
        return True

    def message(self, tag: str) -> bytes:
        """Return the message of a delivery that is held. Raises KeyError."""
        return self._held[tag]

    def past(self, job_id: str) -> Past:
        """Look up what has become of a job before. Raises redis.RedisError."""
        keys = self._keys
        with self._client.pipeline(transaction=False) as pipe:
            pipe.exists(keys.terminal(job_id))
            pipe.lrange(keys.crashes(job_id), 0, -1)
            pipe.zscore(keys.revoked, job_id)
            pipe.smembers(keys.followed(job_id))
            ended, records, revoked_at, followed = pipe.execute()
        attempts = [attempt for job, attempt in (parse_attempt(text(each)) for each in followed) if job == job_id]
        return Past(bool(ended), tuple(map(Crash.read, records)), revoked_at is not None, attempts)

    def note_receipt(self, job_id: str, crashes: Sequence[Crash], *, begun: bool) -> None:
        """Note with the last of the crashes of a job that it was received again, or that it has ``begun`` by now.

        If the next crash finds it received and not begun, its message alone was enough. Raises redis.RedisError.
        """
        last = replace(crashes[-1], received_since=not begun)
        if last != crashes[-1]:
            self._client.lset(self._keys.crashes(job_id), len(crashes) - 1, str(last))

    def forget(self, job_id: str) -> None:
        """Forget the crashes of a job that has ended. Raises redis.RedisError."""
        self._client.delete(self._keys.crashes(job_id))

    def set_aside(self, tag: str) -> None:
        """Put a message that cannot be decoded out of the way, for inspection. Never raises for an outage."""
        with self._lock:
            message = self._drop(tag)
            if message is not None and self._is_current(tag):
                self._unreadable[tag] = message
        self.wake()
        self.flush()

    def flush(self) -> None:
        """Send what was acknowledged or given back and has not reached Redis; keep it if Redis is away."""
        with self._lock:
            acked, returned, unreadable = dict(self._acked), dict(self._returned), dict(self._unreadable)
            taken_up = list(self._taken_up)
            unacked, not_started = self.unacked_key, self._not_started
        try:
            if taken_up:
                self._client.srem(not_started, *taken_up)
            if acked:
                self._placer.let_go(unacked, acked)
            for tag, (placement, crash) in returned.items():
                self._placer.move_held(unacked, not_started, [(tag, placement)], Why.REQUEUE, crash).run()
            for tag, message in unreadable.items():
                self._placer.set_aside_held(unacked, tag, message)
        except redis.RedisError as exc:
            logger.debug("acknowledgements are kept until Redis answers", extra={"error": repr(exc)})
            return
        with self._lock:
            self._taken_up.difference_update(taken_up)
            self._forget_acked(acked)
            for tag in returned:
                self._returned.pop(tag, None)
            for tag in unreadable:
                self._unreadable.pop(tag, None)

    def _forget_acked(self, acked: Iterable[str]) -> None:
        for tag in acked:
            self._acked.pop(tag, None)

    def resync(self, running: Set[str] | None = None) -> int:
        """Deliver again what Redis says this epoch holds and nobody here works on; return how many.

        After a connection broke, ``running`` are the tags that the pool works on: Celery drops all other requests then,
        and a fetch whose reply was lost has given jobs that never arrived. None: the connection stands, and the fetch
        that is under way will bring its jobs itself. Raises redis.RedisError, which Celery takes as the loss of the
        connection.
        """
        with self._lock:
            if running is not None:
                self._held = {tag: message for tag, message in self._held.items() if tag in running}
                self._beside &= running
                self._inbox.clear()
            # After a break no fetch is under way.
            answered = self._answered if running is None else inf
            # Known before the look into Redis: what ends meanwhile is gone here and may still stand in what was read.
            known = {*self._held, *self._acked, *self._returned, *self._unreadable}
        held: Any = self._client.hgetall(self.unacked_key)
        recorded = {text(tag): message for tag, message in held.items()}
        with self._lock:
            missing = [
                item
                for item in recorded.items()
                if item[0] not in known and self._is_current(item[0]) and _fetch_of(item[0]) <= answered
            ]
            self._inbox.extend((tag, message, True) for tag, message in missing)
            self._held.update(missing)
        self.wake()
        return len(missing)

    def disown(self) -> set[str]:
        """Return the tags of what this process holds and the cluster has taken from it. Raises redis.RedisError.

        Nothing of it is started or acknowledged any more; what has not been delivered is forgotten. What it has
        committed itself is not among them, though its delivery went with the commit.
        """
        taken = set(self._find_taken())
        with self._lock:
            self._taken = taken
            for tag, *_ in self._inbox:
                if tag in taken:
                    self._drop(tag)
            self._inbox = deque(item for item in self._inbox if item[0] not in taken)
        self.wake()
        return taken & self._held.keys()

    def holds_only_what_was_taken(self) -> bool:
        """Whether this process holds something, and nothing that is still its own."""
        with self._lock:
            return bool(self._held) and self._held.keys() <= self._taken

    def _find_taken(self) -> list[str]:
        with self._lock:
            held, unacked = dict(self._held), self.unacked_key
        if not held:
            return []
        recorded: Any = self._client.hkeys(unacked)
        gone = [tag for tag in held.keys() - set(map(text, recorded)) if tag in self._held]
        if not gone:
            return []
        ended_by: Any = self._client.mget([self._keys.terminal(job_of(held[tag])) for tag in gone])
        return [tag for tag, ender in zip(gone, ended_by, strict=True) if text(ender or b"").partition(" ")[0] != tag]

    def wake(self) -> None:
        """Let the event loop look for work."""
        os.eventfd_write(self.wake_fd, 1)

    def _is_current(self, tag: str) -> bool:
        return bool(self.epoch) and tag.startswith(self.epoch + ".") and tag not in self._taken


def _fetch_of(tag: str) -> int:
    """The number of the fetch that gave a delivery."""
    return int(tag.split(".")[-2])


_current: Deliveries | None = None


def current() -> Deliveries | None:
    """The register of this process, if it is a node."""
    return _current


def install(deliveries: Deliveries | None) -> None:
    """Make this process a node, or (None) no node any more. A process is one node at most."""
    global _current
    _current = deliveries
