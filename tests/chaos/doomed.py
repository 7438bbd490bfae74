"""An app whose coordinators kill themselves at a chosen command of a failover: ``TEST_DIE_AT`` says at which.

The fence is command 0 of a failover, and the count of the check that is done is its end. At the end it prints how many
commands there were. Only redis-py is wrapped, in this process: the product knows nothing of it.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from redis.connection import AbstractConnection

from tests.chaos.faulty import Pipeline
from tests.process.jobs import make_jobs

BEGINS, ENDS = b"node lost", b":checks\r\n"
_send, _pack = AbstractConnection.send_packed_command, AbstractConnection.pack_commands
_failover = threading.local()


def _pack_parts(self: Any, commands: Iterable[Sequence[Any]]) -> Pipeline:
    return Pipeline.pack(partial(_pack, self), commands)


def _send_parts(self: Any, command: Any, check_health: bool = True) -> None:
    for part in Pipeline.parts(command):
        _count_and_send(self, part, check_health)


def _count_and_send(self: Any, command: Any, check_health: bool) -> None:
    packed = b"".join(command) if isinstance(command, list) else command
    if BEGINS in packed and not hasattr(_failover, "commands"):
        _failover.commands = 0
    if check_health and hasattr(_failover, "commands"):
        if _failover.commands == int(os.environ.get("TEST_DIE_AT", "-1")):
            os.kill(os.getpid(), signal.SIGKILL)
        if ENDS in packed:
            print(f"commands of a failover: {_failover.commands}.", flush=True)
            del _failover.commands
        else:
            _failover.commands += 1
    _send(self, command, check_health=check_health)


AbstractConnection.send_packed_command = _send_parts
AbstractConnection.pack_commands = _pack_parts
app = make_jobs().app
