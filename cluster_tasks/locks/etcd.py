"""Locks in etcd: a key that exists while its lease does; a majority of the servers decides.

The token is the revision at which the key was created. etcd counts one revision up with every change of anything, and
keeps the count over restarts and changes of the leader: what was created later has the greater one.
"""

from __future__ import annotations

import math

from cluster_tasks.addresses.etcd import EtcdUrl
from cluster_tasks.errors import LocksUnavailable
from cluster_tasks.etcd_store import EtcdStore, LeaseExpired, put, read, unchanged
from cluster_tasks.keys import Keys
from cluster_tasks.locks.base import Grant

ABSENT = 0
"""The revision of a key that does not exist."""


class EtcdLocks:
    """A ``LockStore`` in etcd.

    TTLs are rounded up to whole seconds, 2 at least. A new leader lets each lease begin anew. The key of a lock is
    written once, so the revision that made it is also the one that changed it last.
    """

    def __init__(self, address: EtcdUrl, keys: Keys) -> None:
        """Keep the locks under ``<prefix>/<cluster>/locks/``. Does no I/O."""
        self._store = EtcdStore(address, LocksUnavailable)
        self._root = f"{address.prefix}/{keys.name}/locks/"

    def take(self, key: str, ttl_s: float) -> Grant | None:
        """As ``LockStore.take``: a key under a new lease; its token is the revision that made the key."""
        path, doing = self._root + key, "taking a lock"
        # Who waits asks often: a lease is made only where there is hope.
        if self._store.commit([], [read(path, keys_only=True)], doing).found[0]:
            return None
        lease = self._store.grant(math.ceil(ttl_s))
        try:
            made = self._store.commit([unchanged(path, ABSENT)], [put(path, "", lease)], doing)
        except LeaseExpired:  # It took that long.
            return None
        if made.succeeded:
            return Grant(key, made.revision, ttl_s, str(lease))
        # Also if the answer to a first attempt was lost, and the key is ours: it goes with its lease.
        self._store.revoke(lease)
        return None

    def renew(self, grant: Grant) -> bool:
        """As ``LockStore.renew``: keeps the lease alive."""
        # Somebody may have deleted the key of a lease that lives.
        return self._store.keep_alive(int(grant.lease)) and self._is_ours(grant)

    def release(self, grant: Grant) -> bool:
        """As ``LockStore.release``: the key goes with its lease."""
        is_ours = self._is_ours(grant)
        # If it is there no more, a server whose answer was lost has just ended it.
        self._store.revoke(int(grant.lease))
        return is_ours

    def held(self) -> dict[str, float | None]:
        """As ``LockStore.held``."""
        end = self._root[:-1] + chr(ord(self._root[-1]) + 1)
        (found,) = self._store.commit([], [read(self._root, end, keys_only=True)], "looking for locks").found
        return {entry.key.removeprefix(self._root): None for entry in found}

    def close(self) -> None:
        """As ``LockStore.close``."""
        self._store.close()

    def _is_ours(self, grant: Grant) -> bool:
        path = self._root + grant.key
        # With nothing to do, it would be answered by one server as that knows it, and not by a majority.
        then = [read(path, keys_only=True)]
        return self._store.commit([unchanged(path, grant.token)], then, "asking for a lock").succeeded
