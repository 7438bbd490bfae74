"""Nodes without one of their defences, to see that the checker would notice.

``CHAOS_MUTANT=fence|fetch|crashes celery -A tests.chaos.mutants worker``: the scripts of the product are sent to Redis
with some lines changed. A line that is not found ends the worker, so that no mutant turns into a healthy node unseen.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Collection
from hashlib import sha1
from typing import Any

import redis

from cluster_tasks.broker import channel
from cluster_tasks.broker.deliveries import Deliveries
from cluster_tasks.redis_store import RememberedScript, script_source

MUTANT = os.environ.get("CHAOS_MUTANT", "")
RECORDED_LATER_S = 0.3
MUTATIONS = {
    # Whatever a node brings is stored, also after its fence, also when the job has ended.
    "fence": {
        "commit": {
            r"redis\.call\('HEXISTS', KEYS\[1\], ARGV\[1\]\) == 1": "true",
            r"local ended_by = .*": "local ended_by = false",
        }
    },
    # The script gives jobs and the node records them, as a transport does that pops first.
    "fetch": {"fetch": {r"redis\.call\('HSET', KEYS\[\d+\], tag, message\)": ""}},
    # Nobody counts how often a job was running when a process died.
    "crashes": {"move_held": {r"redis\.call\('RPUSH', crashes, .*\)": ""}},
}
"""Mutant → script → what is replaced in it by what."""


def mutate(source: str) -> str:
    """Return a script as the mutant sends it."""
    for name, changes in MUTATIONS[MUTANT].items():
        whole = changed = script_source("cluster_tasks.broker", name)
        for old, new in changes.items():
            changed, found = re.subn(old, new, changed)
            if not found:
                raise SystemExit(f"{name}.lua has nothing like {old} any more: tests/chaos/mutants.py must be changed")
        source = source.replace(whole, changed)
    return source


remember: Callable[..., None] = RememberedScript.__init__
receive: Callable[..., None] = Deliveries.receive


def remember_mutated(self: RememberedScript, client: redis.Redis, script: str) -> None:
    remember(self, client, mutate(script))


def record_later(self: Any, deliveries: Collection[tuple[str, bytes]], *rest: Any) -> None:
    if deliveries:
        time.sleep(RECORDED_LATER_S)
        self._client.hset(self.unacked_key, mapping=dict(deliveries))
    receive(self, deliveries, *rest)


if MUTANT:
    RememberedScript.__init__ = remember_mutated  # type: ignore[method-assign]
if MUTANT == "fetch":
    Deliveries.receive = record_later
    # The channel writes this one to its socket itself.
    channel._FETCH = mutate(channel._FETCH)
    channel._FETCH_SHA = sha1(channel._FETCH.encode(), usedforsecurity=False).hexdigest()

# After the scripts have become the mutant's.
from tests.chaos.audited import app  # noqa: E402

__all__ = ["app"]
