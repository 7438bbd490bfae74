"""Locks in Consul: a key that exists while its session does; a majority of the servers decides.

The token is the index at which the key was created. Consul counts one index up with every write to it, and keeps the
count over restarts and changes of the leader: what was created later has the greater one. (A key's ``LockIndex`` would
begin anew whenever somebody deletes the key.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from cluster_tasks.addresses.consul import ConsulUrl
from cluster_tasks.consul_store import ConsulClient, encoded, foreign_errors
from cluster_tasks.errors import LocksUnavailable
from cluster_tasks.keys import Keys
from cluster_tasks.locks.base import Grant

SHORTEST_TTL_S = 10
"""That Consul takes for a session."""
LOCK_DELAY_S = 1
"""After a session ran out nobody gets its locks for so long: what its holder has sent may still be on its way."""


class ConsulLocks:
    """A ``LockStore`` in Consul.

    TTLs are rounded up to whole seconds, 10 at least. Consul ends a session that nobody renews between one and two
    TTLs after the last renewal, and lets it begin anew when the leader changes.
    """

    def __init__(self, url: ConsulUrl, keys: Keys) -> None:
        """Keep the locks under ``<service>/<cluster>/locks/``. Does no I/O."""
        self._client = ConsulClient(url)
        self._root = f"{url.service}/{keys.name}/locks/"

    def take(self, key: str, ttl_s: float) -> Grant | None:
        """As ``LockStore.take``: a key under a new session; its token is the index that made the key."""
        with self._foreign_errors("taking a lock"):
            # Who waits asks often: a session is made only where there is hope.
            # (Not by its address: in one, Consul takes "." for a folder.)
            if self._client.transact([{"Verb": "get", "Key": self._root + key}], is_read=True):
                return None
            session = self._client.open_session(max(math.ceil(ttl_s), SHORTEST_TTL_S), LOCK_DELAY_S)
            lock = {"Verb": "lock", "Key": self._root + key, "Value": encoded(""), "Session": session}
            if locked := self._client.transact([lock]):
                return Grant(key, locked[0].index, ttl_s, session)
            self._client.end_session(session)
            return None

    def renew(self, grant: Grant) -> bool:
        """As ``LockStore.renew``: renews the session."""
        with self._foreign_errors("renewing a lock"):
            if not self._client.renew_session(grant.lease):
                return False
            # Somebody may have deleted the key of a session that lives.
            return self._client.transact([self._ours(grant)], is_read=True) is not None

    def release(self, grant: Grant) -> bool:
        """As ``LockStore.release``: the key goes with its session."""
        with self._foreign_errors("releasing a lock"):
            # The key first: with a session that ends before it there would be the delay.
            released = self._client.transact([self._ours(grant), {"Verb": "delete", "Key": self._root + grant.key}])
            self._client.end_session(grant.lease)
            return released is not None

    def held(self) -> dict[str, float | None]:
        """As ``LockStore.held``."""
        with self._foreign_errors("looking for locks"):
            found = self._client.transact([{"Verb": "get-tree", "Key": self._root}], is_read=True) or ()
            return {entry.key.removeprefix(self._root): None for entry in found}

    def close(self) -> None:
        """As ``LockStore.close``."""
        self._client.close()

    def _ours(self, grant: Grant) -> dict[str, str]:
        return {"Verb": "check-session", "Key": self._root + grant.key, "Session": grant.lease}

    @contextmanager
    def _foreign_errors(self, doing: str) -> Iterator[None]:
        permission = f'key_prefix "{self._root}" and session_prefix "": write'
        with foreign_errors(LocksUnavailable, doing, permission):
            yield
