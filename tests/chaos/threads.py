"""One thread of a worker that stands still while all the others run."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
from celery import Celery
from celery.worker.control import inspect_command

from tests.process.accounts import END_S
from tests.process.nodes import WorkerProcess

PTRACE_DETACH, PTRACE_SEIZE, PTRACE_INTERRUPT = 17, 0x4206, 0x4207
WALL = 0x40000000
HELPER = "workers.heartbeat"


def tell_threads() -> None:
    """Let the workers of this process be asked for their threads."""

    @inspect_command(name="native_threads")
    def native_threads(state: Any) -> dict[str, int | None]:
        return {thread.name: thread.native_id for thread in threading.enumerate()}


@contextmanager
def pausing(app: Celery, worker: WorkerProcess, name: str) -> Iterator[None]:
    """Stop a thread of a worker by name, and the process that beats beside it if there is one, for as long as the block
    lasts. As a debugger does it: the caller's thread must be the same at both ends."""
    answers = app.control.inspect([worker.id], timeout=END_S, limit=1)._request("native_threads")
    tid = answers[worker.id][name]
    helpers = [child for child in psutil.Process(worker.pid).children() if HELPER in child.cmdline()]
    for helper in helpers:
        helper.suspend()
    _ptrace(PTRACE_SEIZE, tid)
    _ptrace(PTRACE_INTERRUPT, tid)
    os.waitpid(tid, WALL)
    try:
        yield
    finally:
        _ptrace(PTRACE_DETACH, tid)
        for helper in helpers:
            helper.send_signal(signal.SIGCONT)


def _ptrace(request: int, tid: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    libc.ptrace.restype = ctypes.c_long
    if libc.ptrace(request, tid, None, None) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), f"ptrace({request:#x}, {tid})")
