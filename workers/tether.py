"""A command that ends when the process that started it does, however that ends.

``Popen(tethered(SIGTERM, command), env=tethering())`` starts one. The words run this file as a script, which asks the
kernel for the signal and then becomes the command. It does the same again for a tethered command's own children, so a
chain of any length ends with its first process. For the kernel the parent is the *thread* that forked: start from one
that lives as long as its process. Linux only; elsewhere the command just runs.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

PARENT = "TETHERED_TO"
"""Variable that tells a command's children their parent: one that dies before they can ask must not be missed."""
PR_SET_PDEATHSIG = 1


def tethered(end: signal.Signals, command: Sequence[str]) -> list[str]:
    """Return the words that run ``command`` until its parent dies, and then send it ``end``."""
    # Without site-packages, since every process of a cluster pays for this start.
    return [sys.executable, "-I", "-S", __file__, end.name, *command]


def tethering() -> dict[str, str]:
    """Return the environment in which this process starts tethered commands."""
    return {**os.environ, PARENT: str(os.getpid())}


def end_with(parent: int, end: signal.Signals) -> None:
    """Have the kernel send this process ``end`` when its parent dies; exit if that has died already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, end)
        if os.getppid() != parent:
            sys.exit("the parent has died")


def main() -> None:
    """Become the command. It needs no preexec_fn, which can hang in a process with threads."""
    end, *command = sys.argv[1:]
    end_with(int(os.environ[PARENT]), signal.Signals[end])
    os.environ[PARENT] = str(os.getpid())
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
