"""Objects that hold locks, connections or threads, and begin anew in a forked child."""

from __future__ import annotations

import os
from typing import Protocol
from weakref import WeakSet


class Renewable(Protocol):
    """What must not be used in a child as it was in the parent."""

    def after_fork(self) -> None:
        """Make new locks, and forget connections and threads: they are the parent's."""


_objects: WeakSet[Renewable] = WeakSet()


def renewed_after_fork(*objects: Renewable) -> None:
    """Have objects renewed in every child that this process forks."""
    _objects.update(objects)


def _renew() -> None:
    for renewable in list(_objects):
        renewable.after_fork()


os.register_at_fork(after_in_child=_renew)
