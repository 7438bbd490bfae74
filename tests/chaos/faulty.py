"""A client of Redis to which something happens at a chosen command: it dies, loses the reply, is refused, or stops."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import redis

from cluster_tasks.redis_store import connect

END_S = 120.0


class Killed(BaseException):
    """The process ends here, as by SIGKILL: nothing of it catches this."""


class Fuse:
    """What happens to the commands of one process, and at which."""

    def __init__(self) -> None:
        self.commands = 0
        """How many were sent; each of a pipeline counts, a transaction as one: Redis does all of it or nothing."""
        self._burns_at = -1
        self._before: Callable[[], None] | None = None
        self._loses_reply = self._reply_is_lost = False

    def arm(self, at: int, before: Callable[[], None] | None = None) -> None:
        """At command ``at``, counted from the next one as 0, call ``before``; or (None) lose its reply."""
        self.commands, self._burns_at, self._before, self._loses_reply = 0, at, before, before is None

    def disarm(self) -> None:
        """Let all commands pass."""
        self._burns_at, self._reply_is_lost = -1, False

    def sending(self) -> None:
        """A command is about to be sent."""
        burns, self.commands = self.commands == self._burns_at, self.commands + 1
        if burns and self._before is not None:
            self._before()
        self._reply_is_lost |= burns and self._loses_reply

    def reply_is_lost(self) -> bool:
        """Whether the reply that has come never came, and with it what else was asked for in its pipeline."""
        lost, self._reply_is_lost = self._reply_is_lost, False
        return lost


class Pipeline(list[Any]):
    """Commands that are sent together, each as it is packed: a process may end when it has sent a part of them.

    A transaction is one of them, for Redis does all of it or nothing.
    """

    @classmethod
    def pack(cls, pack: Callable[[list[Any]], Any], commands: Iterable[Sequence[Any]]) -> Pipeline:
        """Pack with redis-py's ``pack``, which takes several commands."""
        commands = list(commands)
        return cls([pack(commands)] if commands[0][0] == "MULTI" else (pack([command]) for command in commands))

    @classmethod
    def parts(cls, packed: Any) -> Sequence[Any]:
        """Return what was packed, one after the other."""
        return packed if isinstance(packed, cls) else [packed]


class _FaultyConnection(redis.Connection):
    fuse: Fuse

    def pack_commands(self, commands: Iterable[Sequence[Any]]) -> Any:
        return Pipeline.pack(super().pack_commands, commands)

    def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        for part in Pipeline.parts(command):
            # What a connection says of itself when it is made is none of the process' commands.
            if check_health:
                self.fuse.sending()
            super().send_packed_command(part, check_health=check_health)

    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().read_response(*args, **kwargs)
        finally:
            if self.fuse.reply_is_lost():
                raise redis.ConnectionError("the test lost this reply")


def faulty_client(url: str, fuse: Fuse) -> redis.Redis:
    """Return a client whose commands pass the fuse."""
    return connect(url, connection_class=type("Connection", (_FaultyConnection,), {"fuse": fuse}))


class Paused:
    """Something under way that was stopped at a command; others go on meanwhile."""

    def __init__(self, fuse: Fuse, at: int, doing: Callable[[], None]) -> None:
        """Begin, and return when it is stopped or done."""
        self._goes_on, self._stands = threading.Event(), threading.Event()
        self._error: BaseException | None = None
        self._doing = doing
        fuse.arm(at, self._stop)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._stands.wait(END_S)

    @property
    def is_done(self) -> bool:
        """Whether it was done before it came to that command."""
        return not self._thread.is_alive()

    def go_on(self) -> None:
        """Let it come to its end."""
        self._goes_on.set()
        self._thread.join(END_S)
        assert self.is_done
        if self._error is not None:
            raise self._error

    def _stop(self) -> None:
        self._stands.set()
        assert self._goes_on.wait(END_S)

    def _run(self) -> None:
        try:
            self._doing()
        except BaseException as exc:  # noqa: BLE001 - told to the test, in its own thread.
            self._error = exc
        finally:
            self._stands.set()
