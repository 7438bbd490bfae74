"""What the processes of a prefork pool report is read to its end, though connections to the broker break meanwhile.

Celery reads a report with a generator that it leaves with its event loop until more has come. When a connection breaks
it resets the loop, forgets the generator, and takes what follows for the beginning of another report. Then it closes
its ear to that process: the job comes to no end, and its slot is never free again.
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
