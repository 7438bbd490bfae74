"""How processes learn that what they hold of a cache is void.

Each namespace has a *state* in Redis of two tokens, compared for equality only. The *generation* is renewed when all
of the namespace is void: an entry of another generation is a miss. The *change* is renewed with every key that is
written or deleted, in one step with a message that tells the token before and after it. A process that sees the
tokens follow each other drops the keys that the messages name. If one is missing it drops all that it holds of the
namespace, and the state, read anew when it is older than ``staleness_s``, shows it that without any message.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from secrets import token_hex

import redis

from cluster_tasks.cache.base import check_keys, check_namespace
from cluster_tasks.cache.connection import CacheConnection, Call
from cluster_tasks.cache.forks import renewed_after_fork
from cluster_tasks.clock import Clock
from cluster_tasks.errors import CacheUnavailable
from cluster_tasks.keys import Keys
from cluster_tasks.redis_store import text

logger = logging.getLogger(__name__)

TOLD_AT_ONCE = 100
"""A change of more keys is told as one of all the namespace."""
LISTEN_S = 0.25
"""After so long a listener looks whether it is to go on."""
AGAIN_S = 1.0
Drop = Callable[[str, Sequence[str] | None], object]
"""Is called with a namespace and the keys to forget; None: all."""


@dataclass(frozen=True, slots=True)
class State:
    """What a process knows of a namespace. Times are of the monotonic clock."""

    generation: str
    change: str
    read_at_s: float
    """Before it was asked for."""
    told_at_s: float = float("-inf")
    """When a message was last taken in."""


class Coherence:
    """The states that this process knows. Safe to share between threads, and in forked children."""

    def __init__(self, connection: CacheConnection, keys: Keys, clock: Clock) -> None:
        self._connection, self._keys, self._clock = connection, keys, clock
        self._states: dict[str, State] = {}
        self._drops: dict[str, list[Drop]] = {"": []}
        """By namespace; "": of all."""
        self._lock = threading.Lock()
        self._listener: threading.Thread | None = None
        renewed_after_fork(self)

    def on_change(self, drop: Drop, namespace: str = "") -> None:
        """Have ``drop`` called when something is void, and listen for that from the first use on. Safe to repeat.

        With ``namespace``: when something of that is, as far as this process learns of it anyway.
        """
        drops = self._drops.setdefault(namespace, [])
        if drop not in drops:
            drops.append(drop)

    def known(self, namespace: str, staleness_s: float) -> State | None:
        """Return the state if it was read within ``staleness_s``."""
        state = self._states.get(namespace)
        fresh = state is not None and self._clock.monotonic() - state.read_at_s < staleness_s
        return state if fresh else None

    def learn(self, namespace: str, generation: bytes | str, change: bytes | str, asked_at_s: float) -> State:
        """Take in a state that was read; return it: what was asked for with it is of its time."""
        state = kept = State(text(generation), text(change), asked_at_s)
        with self._lock:
            before = self._states.get(namespace)
            if before is None or before.change != state.change:
                if before is not None and before.told_at_s > asked_at_s:
                    # A message that came meanwhile may tell of something later. The next one who reads asks again.
                    kept = replace(before, read_at_s=float("-inf"))
                # The first state, too: in a Redis Cluster it may be younger than a value that was asked for with it.
                self._drop(namespace, None)
            self._states[namespace] = kept
        if self._drops[""] and (self._listener is None or not self._listener.is_alive()):
            self._listen()
        return state

    def announce(self, namespace: str, keys: Sequence[str] | None, *, new_generation: bool = False) -> str | None:
        """Tell all processes that keys, or all keys, have changed; return the present generation.

        Raises CacheUnavailable: then some may not know.
        """
        told = self.announcement(namespace, keys, new_generation=new_generation)
        # What is void would be served until it runs out.
        return self.hear(self._connection.run(*told, insist=new_generation))

    def announcement(self, namespace: str, keys: Sequence[str] | None, *, new_generation: bool = False) -> Call:
        """Return the script that tells, and its arguments; ``hear`` takes what it returns."""
        told = list(keys) if keys is not None and len(keys) <= TOLD_AT_ONCE else None
        tokens = [token_hex(8), token_hex(8) if new_generation else ""]
        arguments = [*tokens, self._keys.cache_changes, json.dumps([namespace, told])]
        return "announce", [self._keys.cache_state(namespace)], arguments

    def close(self) -> None:
        """Stop listening, and wait for that. Safe to repeat; reading begins it again."""
        with self._lock:
            listener, self._listener = self._listener, None
        if listener is not None:
            listener.join()

    def after_fork(self) -> None:
        """Begin in a child knowing nothing: its own listener will hear what changes."""
        self._lock, self._listener = threading.Lock(), None
        self._states = {}

    def hear(self, message: bytes | str) -> str | None:
        """Take in what was told; return the generation of which it tells, None if it is no message of ours."""
        read = _read(message)
        if read is None:
            return None
        before, change, generation, namespace, keys = read
        now_s = self._clock.monotonic()
        with self._lock:
            state = self._states.get(namespace)
            if state is not None and state.change == change:
                return generation
            if state is not None and state.change == before:
                state = replace(state, generation=generation, change=change, told_at_s=now_s)
            elif state is not None:
                # Something was missed: the state is read before anything is used.
                state, keys = replace(state, read_at_s=float("-inf"), told_at_s=now_s), None
            if state is not None:
                self._states[namespace] = state
            self._drop(namespace, keys)
        return generation

    def _drop(self, namespace: str, keys: Sequence[str] | None) -> None:
        for drop in [*self._drops[""], *self._drops.get(namespace, ())]:
            drop(namespace, keys)

    def _listen(self) -> None:
        with self._lock:
            if self._listener is None or not self._listener.is_alive():
                self._listener = threading.Thread(target=self._hear_all, name="cache-changes", daemon=True)
                self._listener.start()

    def _hear_all(self) -> None:
        me = threading.current_thread()
        while self._listener is me:
            try:
                with closing(self._connection.subscribe(self._keys.cache_changes)) as subscription:
                    while self._listener is me:
                        message = subscription.get_message(timeout=LISTEN_S)
                        if message and message["type"] == "message":
                            self.hear(message["data"])
            except (CacheUnavailable, redis.RedisError, OSError, ValueError) as exc:
                logger.debug("changes of the cache are not heard for now: %s", exc)
                time.sleep(AGAIN_S)


def _read(message: bytes | str) -> tuple[str, str, str, str, list[str] | None] | None:
    """Return the change before, the change, the generation, the namespace and its keys; None: somebody else spoke."""
    try:
        before, change, generation, said = text(message).split(" ", 3)
        namespace, keys = json.loads(said)
        return before, change, generation, check_namespace(namespace), None if keys is None else check_keys(keys)
    except (ValueError, TypeError, RecursionError) as exc:
        logger.debug("not a change of the cache: %r", exc)
        return None
