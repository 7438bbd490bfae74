"""A wall clock of its own for a process, which a test can step while the process runs."""

from __future__ import annotations

import os
from pathlib import Path

from tests.servers import missing

LIBRARIES = ("usr/lib/*/faketime/libfaketimeMT.so.1", "usr/lib*/faketime/libfaketimeMT.so.1")
# The library takes the deadline of a sleep, which is on the monotonic clock, for one on the wall clock.
SLEEP = """
import select, time

def sleep(seconds):
    select.select([], [], [], seconds)

time.sleep = sleep
"""


class SteppedClock:
    """What the processes that are given ``environ`` take for the time of day. Their monotonic clocks stay true."""

    def __init__(self, directory: Path) -> None:
        found = next((path for pattern in LIBRARIES for path in Path("/").glob(pattern)), None)
        if found is None:
            missing("libfaketime is not installed: it steps the clocks of single processes (Debian: faketime)")
        directory.mkdir()
        # Whatever Python process starts under this clock reads it first.
        (directory / "sitecustomize.py").write_text(SLEEP)
        self._file = directory / "time"
        self.environ = {
            # Before jemalloc, which Debian's Redis is linked with and which cannot be started under it.
            "LD_PRELOAD": f"{found} libc.so.6",
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, (str(directory), os.environ.get("PYTHONPATH")))),
        }
        self.step(0)

    def step(self, seconds: int) -> None:
        """Be so far ahead of the true time, or (negative) behind it, from now on."""
        written = self._file.with_suffix(".new")
        written.write_text(f"{seconds:+d}\n")
        written.rename(self._file)
