"""What a prefork pool was given and reports outlasts the connections to the broker that break meanwhile.

Celery reads a report with a generator that it leaves with its event loop until more has come. When a connection breaks
it resets the loop, forgets the generator, and takes what follows for the beginning of another report. Then it closes
its ear to that process: the job comes to no end, and its slot is never free again. It also forgets the jobs that a
process was sent and has not yet said to have begun: they are run all the same, and delivered and run again.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

Reading = Generator[None, None, None]


def read_to_the_end(results: Any) -> None:
    """Have ``results``, the result handler of a prefork pool, go on where it was interrupted."""
    read: Callable[..., Reading] = results._recv_message
    begun: dict[int, tuple[object, Reading]] = {}

    def go_on(add_reader: Any, fd: int, callback: Any) -> Reading:
        # A process that took the place of one that died may have the same descriptor, and is another queue.
        queue = results.fileno_to_outq.get(fd)
        of, reading = begun.get(fd, (None, None))
        if reading is None or of is not queue:
            reading = read(add_reader, fd, callback)
            begun[fd] = queue, reading
        while True:
            try:
                next(reading)
            except BaseException as exc:
                del begun[fd]
                if isinstance(exc, StopIteration):
                    return
                raise
            # Not "yield from": whoever forgets this generator must not end the one within.
            yield

    results._recv_message = go_on


def keep_what_was_sent(pool: Any) -> None:
    """Have ``pool``, a prefork pool, keep what its processes were sent when a connection breaks."""
    flush: Callable[[], None] = pool.flush

    def flush_the_rest() -> None:
        sent = unaccepted(pool)
        for job in sent:
            # What has been accepted is kept.
            job._accepted = True
        try:
            flush()
        finally:
            for job in sent:
                # It may have been meanwhile.
                job._accepted = job._time_accepted is not None

    pool.flush = flush_the_rest


def unaccepted(pool: Any) -> list[Any]:
    """What living processes of a prefork pool were sent, and have not said to have begun."""
    return [
        job
        for job in tuple(pool._pool._cache.values())
        if not job._accepted and job._write_to is not None and job._write_to._is_alive()
    ]


def sent_requests(pool: Any) -> list[Any]:
    """The requests of such jobs."""
    owners = (getattr(job._accept_callback, "__self__", None) for job in unaccepted(pool))
    # A batch is the owner of several.
    return [request for owner in owners if owner is not None for request in getattr(owner, "requests", [owner])]
