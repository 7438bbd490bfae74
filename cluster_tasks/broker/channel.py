"""The Kombu transport: Redis lists as ever, with fetches that record what they give.

Queues of the cluster (``node.*``, ``waiting.*``) are filled and emptied by scripts only. All other queues work as on
Kombu's own Redis transport, on the same connection.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Collection
from functools import cached_property
from hashlib import sha1
from queue import Empty
from typing import Any, Literal

import redis
from kombu.transport import redis as stock
from kombu.utils.json import dumps, loads

from cluster_tasks.broker import deliveries
from cluster_tasks.broker.deliveries import Deliveries
from cluster_tasks.broker.hedging import Hedge
from cluster_tasks.broker.message import (
    DELIVERY_PROPERTY,
    Delivery,
    Placement,
    check_payload,
    due_time,
    place_message,
)
from cluster_tasks.broker.placement import Placer, fetching_script, let_go_arguments, placing_script
from cluster_tasks.broker.publishing import PUBLISH_PROPERTY, begin_publish, end_publish
from cluster_tasks.broker.sequels import FOLLOWS_PROPERTY, Sequel
from cluster_tasks.broker.unpacking import too_large, unpacked_size
from cluster_tasks.errors import ConfigurationError, InvalidQueue, PayloadTooLarge, StaleCommit
from cluster_tasks.keys import DEFAULT_NAME, Keys, priority_suffixes
from cluster_tasks.model import check_node_id
from cluster_tasks.redis_store import load_script, refusals_as_outages, script_source, text

logger = logging.getLogger(__name__)

BELL_WAIT_S = 1.0
"""Of one command: after little more, a connection that gives no answer is taken for broken."""
IDLE_WAIT_S = 5.0
"""At the doorbell, of a node that idles. It is rung for what it could do, and by its own heartbeat if that was lost."""
LIMITED_WAIT_S = 0.1
"""The same of a node that is not given all it could run."""
SHORTEST_WAIT_S = 0.01
"""Redis 6.2 takes a millisecond for endless."""
GLANCE_EVERY_S = 0.02
WITHIN = b"within "
"""What a doorbell says, before seconds, when there is nothing to fetch yet."""
_SUFFIXES = priority_suffixes()
_FETCH = fetching_script()
_OPTIONS = ("cluster_name", "cluster_max_message_bytes")
_GLANCE = script_source(__package__, "glance")
_FETCH_SHA = sha1(_FETCH.encode(), usedforsecurity=False).hexdigest()


class ClusterQoS(stock.QoS):
    """Acknowledges what came from the cluster's queues through the register of the process."""

    def can_consume(self) -> bool:
        """Whether a slot is free, or a job that fills one waits to be delivered.

        What other queues delivered fills slots as well.
        """
        node = self.channel.node
        if node is None:
            return bool(super().can_consume())
        if node.undelivered():
            return True
        foreign = len(self._delivered) - len(self._dirty)
        return bool(node.free_slots() > foreign)

    def append(self, message: Any, delivery_tag: str) -> None:
        """Note a message of other queues; what is the cluster's is noted by its node."""
        # Not "whether the node holds it": it may have let go of it just now, and Kombu must never hold it then.
        if Delivery.of(message.properties) is None:
            super().append(message, delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        """Acknowledge a message, one of the cluster's through its node: kept while Redis is away."""
        if delivery_tag in self._delivered or (node := deliveries.current()) is None:
            super().ack(delivery_tag)
        else:
            node.ack(delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """Give a message back to all nodes with ``requeue``, else let go of it."""
        if delivery_tag in self._delivered or (node := deliveries.current()) is None:
            super().reject(delivery_tag, requeue=requeue)
        elif requeue:
            node.requeue(delivery_tag)
        else:
            node.ack(delivery_tag)


class ClusterChannel(stock.Channel):
    """A channel that fetches for a node: fetch, deliver, …, empty, wait at the bell, fetch."""

    QoS = ClusterQoS
    cluster_name = DEFAULT_NAME
    cluster_max_message_bytes = 0
    """0: no limit."""
    from_transport_options = (*stock.Channel.from_transport_options, *_OPTIONS)  # type: ignore[assignment]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._next: Literal["fetch", "bell", "glance"] = "fetch"
        self._under_way: Literal["fetch", "bell", "glance"] | None = None
        self._fetching: Deliveries | None = None
        """Who sent the fetch under way."""
        self._carried: Collection[str] = ()
        """Acknowledged tags that the fetch under way carries."""
        self._asked = 0
        """How many jobs it asks for."""
        self._glanced_s = 0.0
        self._bell_until_s = 0.0
        """When it is to fetch at the latest."""
        self._fetch_by_text = False
        self._for_commands: redis.Redis | None = None
        super().__init__(*args, **kwargs)

    @cached_property
    def keys(self) -> Keys:
        """Names of the Redis keys of its cluster."""
        return Keys(self.cluster_name)

    def _create_client(self, asynchronous: bool = False) -> redis.Redis:
        if asynchronous:
            client: redis.Redis = super()._create_client(asynchronous=True)
            return client
        # Kombu builds one for each command, for every event too: a quarter of what it costs to publish.
        if self._for_commands is None or self._for_commands.connection_pool is not self.pool:
            self._for_commands = super()._create_client()
        return self._for_commands

    @cached_property
    def _placer(self) -> Placer:
        return Placer(self._create_client(), self.keys)

    @cached_property
    def _queue_control(self) -> redis.commands.core.Script:
        return load_script(self._create_client(), __package__, "queue_control")

    @cached_property
    def _purge_script(self) -> redis.commands.core.Script:
        return load_script(self._create_client(), __package__, "purge")

    @property
    def node(self) -> Deliveries | None:
        """The register of this process, if this channel consumes its list."""
        node = deliveries.current()
        return node if node is not None and node.queue in self._active_queues else None

    # Publishing.

    def _put(self, queue: str, message: dict[str, Any], **kwargs: Any) -> None:
        check_queue(self.keys, queue)
        properties = message["properties"]
        way = {name: properties.pop(name) for name in (FOLLOWS_PROPERTY, PUBLISH_PROPERTY) if name in properties}
        try:
            if queue == self.keys.control_queue:
                self._put_control(queue, message)
            elif not self.keys.owns(queue):
                super()._put(queue, message, **kwargs)
            else:
                self._put_job(queue, message, way, kwargs.get("_publish_batch"))
        finally:
            # Kombu repeats a publish that has failed with these very properties.
            properties.update(way)

    def _put_job(self, queue: str, message: dict[str, Any], way: dict[str, Any], batch: Any) -> None:
        target = queue if self.keys.node_of(queue) else ""
        placement = place_message(message, self._encoded(message), self.keys, target)
        due, hedge = due_time(message), Hedge.of(message["properties"])
        with refusals_as_outages(self._placer.client):
            if FOLLOWS_PROPERTY in way:
                self._follow(placement, due, Sequel(*way[FOLLOWS_PROPERTY]))
            elif batch is None or due is not None or hedge is not None:
                publish = way[PUBLISH_PROPERTY] = way.get(PUBLISH_PROPERTY) or begin_publish()
                self._placer.publish(placement, publish, due, IDLE_WAIT_S, hedge)
                end_publish(way.pop(PUBLISH_PROPERTY))
            else:
                arguments = [self.keys.bell_prefix, *placement.arguments()]
                batch.add("eval", placing_script("place"), len(self._placer.index), *self._placer.index, *arguments)

    def _encoded(self, message: dict[str, Any]) -> str:
        encoded: str = dumps(message)
        size = self._unpacked(message, len(encoded))
        if 0 < self.cluster_max_message_bytes < size:
            known = f"{size} bytes" if size == len(encoded) else f"at least {size} bytes uncompressed"
            raise PayloadTooLarge(
                f"the message of a job of {message['headers'].get('task')} has {known} and may have "
                f"{self.cluster_max_message_bytes}: store its arguments elsewhere, or raise cluster_max_message_bytes"
            )
        return encoded

    def _unpacked(self, message: dict[str, Any], size: int) -> int:
        """The bytes of a message of ``size``, or, if its body is compressed, those that it would have if it were not.

        When it is clear that these are too many, they are not counted further.
        """
        body, compression = message.get("body"), (message.get("headers") or {}).get("compression")
        if not body or not compression or not self.cluster_max_message_bytes:
            return size
        try:
            packed = self.decode_body(body, message["properties"].get("body_encoding"))
            unpacked = unpacked_size(packed, compression, self.cluster_max_message_bytes)
        except Exception:  # noqa: BLE001 - whatever is wrong with it, who reads it as a job tells that better.
            return size
        return max(size, size - _in_base64(len(packed)) + _in_base64(unpacked))

    def _refuse_bomb(self, message: dict[str, Any], size: int) -> None:
        if size < (unpacked := self._unpacked(message, size)) and unpacked > self.cluster_max_message_bytes:
            raise too_large(self.cluster_max_message_bytes)

    def _follow(self, placement: Placement, due: float | None, sequel: Sequel) -> None:
        if not self._placer.follow(placement, sequel, due, IDLE_WAIT_S):
            raise StaleCommit(f"{sequel.node_id} must not publish what follows its job: the delivery was taken away")

    def _put_control(self, queue: str, message: dict[str, Any]) -> None:
        last = self.keys.queued_control(message["headers"].get("task", ""))
        self._queue_control([queue, last], [dumps(message)])

    def _purge(self, queue: str) -> int:
        if queue == self.keys.delayed:
            with self.conn_or_acquire() as client, client.pipeline() as pipe:
                return int(pipe.zcard(queue).delete(queue).execute()[0])
        if not self.keys.owns(queue):
            return int(super()._purge(queue))
        lists = [queue + suffix for suffix in _SUFFIXES]
        return int(self._purge_script([self.keys.backlog, queue, *lists]))

    def _delete(self, queue: str, *args: Any, **kwargs: Any) -> None:
        super()._delete(queue, *args, **kwargs)
        if self.keys.owns(queue):
            self._purge(queue)

    def _size(self, queue: str) -> int:
        if queue != self.keys.delayed and not self.keys.owns(queue):
            return int(super()._size(queue))
        with self.conn_or_acquire() as client:
            if queue == self.keys.delayed:
                return int(client.zcard(queue))
            # Our lists have Kombu's own steps, whatever priority_steps and sep the other queues are given.
            return sum(client.llen(queue + suffix) for suffix in _SUFFIXES)

    # Consuming. Kombu's poller calls _brpop_start when no command is under way and _brpop_read when a reply is there.

    def _brpop_start(self, timeout: float | None = None) -> None:
        node = self.node
        if node is None:
            super()._brpop_start(timeout)
        elif not self._deliver_inbox(node):
            # Whatever ends a wait or a glance, a fetch follows.
            command, self._next = self._next, "fetch"
            self._under_way = command
            if command == "fetch":
                self._fetch(node)
            elif command == "bell":
                node.at_bell = True
                wait_s = min(max(self._bell_until_s - stock.monotonic(), SHORTEST_WAIT_S), BELL_WAIT_S)
                self._send("BRPOP", node.bell, *self._lists_of_others(node), wait_s)
            else:
                lists = self._lists_of_others(node)
                self._send("EVAL", _GLANCE, len(lists), *lists)

    def _send(self, *command: Any) -> None:
        self._in_poll = self.client.connection
        self._brpop_sent_at = stock.monotonic()  # type: ignore[assignment]
        self.client.connection.send_command(*command)

    def _fetch(self, node: Deliveries) -> None:
        keys = self.keys
        epoch, first_tag, acked = node.next_fetch()
        names = [keys.epochs, keys.draining, keys.backlog, keys.idle, keys.serves, keys.slot_limits]
        names += [node.unacked_of(epoch), keys.delayed, keys.suspects_held, keys.fencing_token]
        names += [keys.hedges(node.node_id), keys.hedged(node.node_id), keys.counters]
        script = ("EVAL", _FETCH) if self._fetch_by_text else ("EVALSHA", _FETCH_SHA)
        self._fetching, self._carried, self._asked = node, acked, self._wanted(node)
        self._send(
            *(*script, len(names), *names, keys.bell_prefix, node.queue, epoch, self._asked, first_tag),
            *(len(_SUFFIXES), len(node.waiting), *_SUFFIXES, *node.waiting, *node.suspects),
            *let_go_arguments(keys, acked),
        )

    def _wanted(self, node: Deliveries) -> int:
        foreign = len(self.qos._delivered) - len(self.qos._dirty)
        return max(node.free_slots() - foreign, 0)

    def _lists_of_others(self, node: Deliveries) -> list[str]:
        queues = [queue for queue in self._queue_cycle.consume(len(self.active_queues)) if queue != node.queue]
        return [self._q_for_pri(queue, step) for step in self.priority_steps for queue in queues]

    def _brpop_read(self, **options: Any) -> Any:
        command, self._under_way = self._under_way, None
        return self._read_fetch() if command == "fetch" else self._read_others(at_bell=command == "bell")

    def _reply(self, command: str) -> Any:
        connection = self.client.connection
        try:
            return self.client.parse_response(connection, command)
        except self.connection_errors:
            connection.disconnect()
            raise
        except redis.exceptions.NoScriptError:
            self._fetch_by_text = True
            raise Empty from None
        except redis.ResponseError as exc:
            # READONLY, LOADING, OOM: this server cannot be worked with now. Reconnecting waits and looks again.
            connection.disconnect()
            raise redis.ConnectionError(f"Redis refused {command}: {exc}") from exc
        finally:
            self._in_poll = False

    def _read_others(self, *, at_bell: bool) -> bool:
        if (node := deliveries.current()) is not None:
            node.at_bell = False
        reply = self._reply("BRPOP")
        if reply is None or text(reply[0]).startswith(self.keys.bell_prefix):
            if node is not None and reply is not None and reply[1].startswith(WITHIN):
                due_s = stock.monotonic() + float(reply[1].removeprefix(WITHIN))
                self._bell_until_s = min(self._bell_until_s, due_s)
                self._wait_on(node)
            elif at_bell and node is not None and reply is None and not self._is_to_fetch():
                self._wait_on(node)
            raise Empty
        queue = text(reply[0]).rsplit(self.sep, 1)[0]
        self._queue_cycle.rotate(queue)
        try:
            payload = self._decode_foreign(reply[1])
        except Exception as exc:  # noqa: BLE001 - whatever a broken message raises, it must not end its reader.
            logger.error("a message of %s that cannot be decoded is set aside: %r", queue, exc)
            with refusals_as_outages(self._placer.client):
                self._placer.keep_undecodable(reply[1])
            raise Empty from None
        self.connection._deliver(payload, queue)
        return True

    def _is_to_fetch(self) -> bool:
        return self._bell_until_s - stock.monotonic() <= SHORTEST_WAIT_S

    def _wait_on(self, node: Deliveries) -> None:
        """Go on waiting at the doorbell, without a fetch."""
        self._next, node.at_bell = "bell", True
        # What was acknowledged just now has waited for a fetch.
        node.flush()

    def _decode_foreign(self, message: bytes) -> dict[str, Any]:
        payload = check_payload(loads(text(message)))
        self._refuse_bomb(payload, len(message))
        properties = payload["properties"]
        # Only a list of the cluster gives deliveries; here it is a stranger's word.
        properties.pop(DELIVERY_PROPERTY, None)
        # Kombu keeps it by these until it is acknowledged, and decodes its body, where an error would end the worker.
        properties["delivery_tag"].encode()
        properties["delivery_info"]["exchange"], properties["delivery_info"]["routing_key"]
        if body := payload.get("body"):
            self.decode_body(body, properties.get("body_encoding"))
        return payload

    def _read_fetch(self) -> bool:
        status, due_ms, *items = self._reply("EVALSHA")
        self._fetch_by_text = False
        # It may be given more as soon as a job ends, and nobody rings it for that.
        wait_s = LIMITED_WAIT_S if text(status).startswith("limited ") else IDLE_WAIT_S
        self._bell_until_s = stock.monotonic() + (min(int(due_ms) / 1000, wait_s) if due_ms else wait_s)
        tags = list(map(text, items[::2]))
        given = [(tag.lstrip("+"), message) for tag, message in zip(tags, items[1::2], strict=True)]
        beside = {tag[1:] for tag in tags if tag.startswith("+")}
        standing, _, trial = text(status).partition(" ")
        node, self._fetching = self._fetching, None
        assert node is not None
        node.receive(given, self._carried, trial, beside)
        if self.node is None:
            # The consumer was cancelled meanwhile. Each goes before the others, so the first one comes last.
            for tag, _ in reversed(given):
                node.requeue(tag)
            raise Empty
        # Not "whether slots are free now": one that was freed meanwhile must not send us to wait beside a full list.
        if standing in ("fenced", "draining") or len(given) - len(beside) < self._asked:
            self._next = "bell"
        elif len(self.active_queues) > 1 and stock.monotonic() - self._glanced_s > GLANCE_EVERY_S:
            # Queues that are not ours are read at the bell, which a busy node does not reach.
            self._next, self._glanced_s = "glance", stock.monotonic()
        if not self._deliver_inbox(node):
            raise Empty
        return True

    def _deliver_inbox(self, node: Deliveries) -> bool:
        delivered = False
        while (item := node.next()) is not None:
            delivery, message, again = item
            delivered = True
            try:
                payload = self._decode(delivery, message, again)
            except Exception as exc:  # noqa: BLE001 - whatever a broken message raises, it must harm no other.
                _set_aside(node, delivery, exc)
                continue
            if _was_delivered(payload) and not node.admit(delivery, payload):
                continue
            try:
                # Not before: of a body that ends who unpacks it, only its past tells that.
                self._refuse_bomb(payload, len(message))
            except PayloadTooLarge as exc:
                _set_aside(node, delivery, exc)
                continue
            self.connection._deliver(payload, node.queue)
        if delivered:
            node.all_read()
        return delivered

    def _decode(self, delivery: Delivery, message: bytes, again: bool) -> dict[str, Any]:
        payload = check_payload(loads(text(message)))
        properties = payload["properties"]
        if body := payload.get("body"):
            # Kombu decodes it where an error would end the worker.
            payload["body"] = self.decode_body(body, properties.pop("body_encoding", None))
        if again:
            properties["delivery_info"] = {**(properties.get("delivery_info") or {}), "redelivered": True}
        properties["delivery_tag"] = delivery.tag
        properties[DELIVERY_PROPERTY] = [delivery.node_id, delivery.epoch, delivery.tag]
        return payload

    def _receive_one(self, c: Any) -> Any:
        # The loop may have been told of a connection that has been replaced since, whose number the new one has. To
        # wait for what is not there would stop the loop.
        try:
            is_there = c.connection is None or c.connection.can_read(timeout=0)
        except self.connection_errors:
            self._in_listen = False
            raise
        if not is_there:
            raise Empty
        if c.connection is not None:
            # What is to be read shows that it lives. redis-py would ask once more for each answer to Kombu's PING.
            c.connection.next_health_check = stock.monotonic() + c.connection.health_check_interval
        return super()._receive_one(c)

    def close(self) -> None:
        """Close it without waiting for a fetch under way: what that gives is recorded, and resynced."""
        if self._under_way == "fetch":
            # Kombu would wait for the reply and deliver it. What it gives is recorded in Redis and not lost.
            self._in_poll = False
        super().close()


class ClusterSentinelChannel(ClusterChannel, stock.SentinelChannel):
    """The same behind Redis Sentinel."""

    from_transport_options = (*stock.SentinelChannel.from_transport_options, *_OPTIONS)  # type: ignore[assignment]


class ClusterTransport(stock.Transport):
    """Kombu's Redis transport with channels of the cluster."""

    Channel = ClusterChannel

    def __init__(self, client: Any, **kwargs: Any) -> None:
        if client.transport_options.get("global_keyprefix"):
            # Kombu prefixes the first key of a script only.
            raise ConfigurationError("global_keyprefix cannot be used here; clusters that share a Redis differ by name")
        super().__init__(client, **kwargs)

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        """Let the loop wake when a slot gets free in another thread."""
        super().register_with_event_loop(connection, loop)
        node = deliveries.current()
        if node is not None:
            # A job that ends in a thread of the pool frees a slot while the loop sleeps.
            node.loop_thread = threading.get_ident()
            loop.add_reader(node.wake_fd, _drain_wake_fd, node.wake_fd)


class ClusterSentinelTransport(ClusterTransport, stock.SentinelTransport):
    """The same behind Redis Sentinel."""

    Channel = ClusterSentinelChannel
    default_port = stock.SentinelTransport.default_port


def check_queue(keys: Keys, queue: str) -> None:
    """Raise InvalidQueue for a name under which jobs would be lost, or stop the cluster."""
    node_id = keys.node_of(queue)
    try:
        if node_id is not None:
            check_node_id(node_id)
    except ValueError as exc:
        raise InvalidQueue(f"no job can be sent to {queue!r}: {exc}") from None
    if keys.reserves(queue):
        raise InvalidQueue(f"no job can be sent to {queue!r}: the cluster keeps something else there")


def _in_base64(size: int) -> int:
    """The length of so many bytes in Base64, as Kombu writes it."""
    return (size + 2) // 3 * 4


def _set_aside(node: Deliveries, delivery: Delivery, exc: Exception) -> None:
    logger.error("a message that cannot be decoded is set aside: %r", exc)
    node.set_aside(delivery.tag)


def _was_delivered(payload: dict[str, Any]) -> bool:
    """Whether a message was with a node before; only then its job can have a past."""
    return bool((payload["properties"].get("delivery_info") or {}).get("redelivered"))


def _drain_wake_fd(fd: int) -> None:
    os.eventfd_read(fd)
