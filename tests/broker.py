"""What the tests of the broker share: real messages, and the steps of a node's channel one at a time."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import redis
from celery import Celery

from cluster_tasks.broker.epochs import EpochTable
from cluster_tasks.broker.members import named
from cluster_tasks.broker.message import Placement, place_message
from cluster_tasks.broker.message import job_of as job_named
from cluster_tasks.broker.placement import Crash, Placer, Why, fetching_script, let_go_arguments
from cluster_tasks.failover.evacuation import Evacuation
from cluster_tasks.keys import ANY_TYPE, Keys, priority_suffixes
from cluster_tasks.redis_store import connect, text

SUFFIXES = priority_suffixes()


@cache
def _template() -> str:
    app = Celery("template", broker="memory://", set_as_current=False)
    app.send_task("jobs.work", args=["some text"], task_id="template")
    with app.connection_for_read() as connection:
        message = connection.default_channel._get("celery")
    return json.dumps(message)


def make_message(job_id: str, request_type: str = ANY_TYPE, priority: object = 0, **properties: object) -> bytes:
    """Return a message as Celery and Kombu build it."""
    message = json.loads(_template())
    message["headers"]["id"] = message["properties"]["correlation_id"] = job_id
    message["properties"].update(priority=priority, request_type=request_type, **properties)
    return json.dumps(message).encode()


def make_members(job_ids: Sequence[str], message_id: str = "message", request_type: str = ANY_TYPE) -> bytes:
    """Return a message of several jobs; the argument of each is its id."""
    message = json.loads(make_message(message_id, request_type))
    message["headers"].update(root_id=message_id, members=named(list(job_ids)))
    body = [
        [[[job_id], {}] for job_id in job_ids],
        {},
        {"callbacks": None, "errbacks": None, "chain": None, "chord": None},
    ]
    message["body"] = b64encode(json.dumps(body).encode()).decode()
    return json.dumps(message).encode()


def job_of(message: bytes) -> str:
    """Return the id of the job in a message; of one that is none, its text."""
    try:
        return str(json.loads(message)["headers"]["id"])
    except ValueError:
        return text(message)


@dataclass(frozen=True)
class Fetched:
    """The answer to a fetch."""

    status: str
    messages: dict[str, bytes]
    """By tag, in the order given."""
    beside: frozenset[str] = frozenset()
    """The tags of those that share the place of the one before."""

    @property
    def jobs(self) -> list[str]:
        """The ids of the jobs, in the order given."""
        return [job_of(message) for message in self.messages.values()]

    @property
    def places(self) -> list[str]:
        """The ids of the jobs of each place, one after the other."""
        places: list[str] = []
        for tag, message in self.messages.items():
            if tag in self.beside:
                places[-1] += job_of(message)
            else:
                places.append(job_of(message))
        return places


class Broker:
    """The lists of one cluster, seen from below."""

    def __init__(self, url: str, name: str = "cluster") -> None:
        self.client: redis.Redis = connect(url)
        self.keys = Keys(name)
        self.epochs = EpochTable(self.client, self.keys)
        self.placer = Placer(self.client, self.keys)
        self.evacuation = Evacuation(self.client, self.keys)
        self._fetch = self.client.register_script(fetching_script())
        self._fetches = 0

    def open(self, node_id: str, *serves: str, recovery_threshold: int = 0, zone: str = "") -> str:
        """Begin an epoch, which must not be refused."""
        epoch = self.epochs.open(node_id, serves, recovery_threshold=recovery_threshold, zone=zone)
        assert isinstance(epoch, str)
        return epoch

    def publish(self, job_id: str, node_id: str = "", request_type: str = ANY_TYPE, priority: object = 0) -> str:
        """Place a job; return the list that it went to."""
        return self.put(make_message(job_id, request_type, priority), self.keys.node_queue(node_id) if node_id else "")

    def put(self, message: bytes, queue: str = "") -> str:
        """Place a message as the channel does."""
        return self.placer.place([place_message(json.loads(message), message, self.keys, queue)])[0]

    def fetch(
        self, node_id: str, epoch: str, want: int = 1, serves: Iterable[str] = (), acked: Iterable[str] = (),
        first_tag: str = "",
    ) -> Fetched:  # fmt: skip
        """Fetch as the channel does."""
        keys, types = self.keys, sorted({*serves, ANY_TYPE})
        self._fetches += 1
        status, _, *items = self._fetch(
            [keys.epochs, keys.draining, keys.backlog, keys.idle, keys.serves, keys.slot_limits]
            + [keys.unacked(node_id, epoch), keys.delayed, keys.suspects_held, keys.fencing_token]
            + [keys.hedges(node_id), keys.hedged(node_id), keys.counters],
            [keys.bell_prefix, keys.node_queue(node_id), epoch, want, first_tag or f"{epoch}.{self._fetches}."]
            + [
                len(SUFFIXES),
                len(types),
                *SUFFIXES,
                *map(keys.waiting_queue, types),
                *map(keys.suspect_queue, types),
                *let_go_arguments(keys, {tag: self.job_held(node_id, epoch, tag) for tag in acked}),
            ],
        )
        tags = list(map(text, items[::2]))
        return Fetched(
            text(status),
            {tag.lstrip("+"): message for tag, message in zip(tags, items[1::2], strict=True)},
            frozenset(tag[1:] for tag in tags if tag.startswith("+")),
        )

    def job_held(self, node_id: str, epoch: str, tag: str) -> str:
        """The job of a delivery; empty if it does not stand."""
        message: Any = self.client.hget(self.keys.unacked(node_id, epoch), tag)
        return job_named(message or b"")

    def move_held(
        self, node_id: str, epoch: str, moved: Sequence[tuple[str, Placement]], crash: Crash | None = None
    ) -> int:
        """Give back what an epoch holds."""
        source, not_started = self.keys.unacked(node_id, epoch), self.keys.not_started(node_id, epoch)
        return int(self.placer.move_held(source, not_started, moved, Why.REQUEUE, crash).run())

    def listed(self, queue: str) -> list[str]:
        """The jobs of a list, the next one first, more urgent ones before others."""
        lists: list[Any] = [self.client.lrange(queue + suffix, 0, -1) for suffix in SUFFIXES]
        return [job_of(message) for found in lists for message in reversed(found)]

    def waiting(self, request_type: str = ANY_TYPE) -> list[str]:
        """The jobs of a waiting list, as ``listed``."""
        return self.listed(self.keys.waiting_queue(request_type))

    def held(self, node_id: str, epoch: str) -> list[str]:
        """The jobs that an epoch holds."""
        messages: Any = self.client.hvals(self.keys.unacked(node_id, epoch))
        return [job_of(message) for message in messages]

    def idle(self) -> list[str]:
        """The lists of the idle nodes, those that idle longest first."""
        names: Any = self.client.zrange(self.keys.idle, 0, -1)
        return [text(name) for name in names]

    def rings(self, node_id: str) -> int:
        """How often the doorbell of a node was rung."""
        rings: Any = self.client.llen(self.keys.bell(node_id))
        return int(rings)

    def undecodable(self) -> list[bytes]:
        """What was set aside, the last one first."""
        messages: Any = self.client.lrange(self.keys.undecodable, 0, -1)
        return list(messages)

    def close(self) -> None:
        """Give up the connection."""
        self.client.close()
