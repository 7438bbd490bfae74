"""The way back: all jobs of a cluster go to Celery's own queues, for workers of the app without ``Cluster(app)``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any, cast

import redis

from cluster_tasks.broker.delays import entry_message
from cluster_tasks.broker.members import member_ids, split
from cluster_tasks.broker.message import check_payload, priority_suffix
from cluster_tasks.broker.placement import UNDECODABLE_KEPT
from cluster_tasks.errors import BrokerUnavailable
from cluster_tasks.keys import Keys, priority_suffixes
from cluster_tasks.redis_store import foreign_errors, load_script, text

CHUNK = 100


class Release:
    """Gives jobs back, each move one step. Raises BrokerUnavailable when Redis does not answer.

    ``queue_of`` says by the headers of a message in which queue of Celery it belongs.
    """

    def __init__(self, client: redis.Redis, keys: Keys, queue_of: Callable[[dict[str, Any]], str]) -> None:
        self._client, self._keys, self._queue_of = client, keys, queue_of
        self._give_back = load_script(client, "cluster_tasks.broker", "give_back")

    def run(self) -> int:
        """Move what waits in the lists and what is delayed; return how many jobs. Safe to repeat.

        What nodes hold is theirs: it has to be evacuated before.
        """
        with foreign_errors(BrokerUnavailable, "giving jobs back to Celery's queues"):
            listed: Any = self._client.zrange(self._keys.backlog, 0, -1)
            moved = sum(self._list(text(queue)) for queue in listed)
            moved += self._delayed()
            self._client.ltrim(self._keys.undecodable, 0, UNDECODABLE_KEPT - 1)
            return moved

    def _list(self, queue: str) -> int:
        moved = 0
        for source in (queue + suffix for suffix in priority_suffixes()):
            while messages := cast(list[bytes], self._client.lrange(source, -CHUNK, -1)):
                # The one at the end is the next in turn.
                moved += self._move(source, queue, [(message, message) for message in reversed(messages)])
        return moved

    def _delayed(self) -> int:
        moved = 0
        while entries := cast(list[bytes], self._client.zrange(self._keys.delayed, 0, CHUNK - 1)):
            moved += self._move(self._keys.delayed, "", [(entry, entry_message(entry)) for entry in entries])
        return moved

    def _move(self, source: str, queue: str, found: Iterable[tuple[bytes, bytes]]) -> int:
        arguments: list[Any] = []
        for there, message in found:
            queue_there, messages = self._as_celery_has_it(message)
            arguments += [there, queue_there, len(messages), *messages]
        moved: int = self._give_back([source, self._keys.backlog], [queue, *arguments])
        return moved

    def _as_celery_has_it(self, message: bytes) -> tuple[str, list[bytes | str]]:
        """The list of a message, its priority included, and the message, which names the queue that it is in.

        One of several jobs is one for each of them.
        """
        try:
            payload = check_payload(json.loads(message))
            payloads = split(message) if member_ids(payload.get("headers")) else [payload]
        except (ValueError, RecursionError):
            return self._keys.undecodable, [message]
        queue = self._queue_of(payload.get("headers") or {})
        for each in payloads:
            # A worker that dies or loses its connection puts it back by this.
            each["properties"]["delivery_info"] = {"exchange": "", "routing_key": queue}
        suffix = priority_suffix(payload["properties"].get("priority"))
        return queue + suffix, [json.dumps(each) for each in payloads]
