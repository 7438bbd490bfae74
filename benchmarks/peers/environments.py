"""Virtual environments for what cannot be installed beside this project: arq pulls redis-py down to 5."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

DONE = "installed"


def cache_directory() -> Path:
    """Where they lie: ``cluster-tasks/benchmarks`` in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "cluster-tasks" / "benchmarks"


def environment(name: str, requirements: Sequence[str]) -> Path:
    """Return the folder of an environment that has just these; it is made, with pip, when it is first needed.

    Raises RuntimeError with what pip said if they cannot be installed.
    """
    told = "\n".join((sys.version, *requirements))
    made = cache_directory() / f"{name}-{hashlib.sha256(told.encode()).hexdigest()[:12]}"
    if (made / DONE).exists():
        return made
    # What an earlier run left half made is of no use.
    shutil.rmtree(made, ignore_errors=True)
    print(f"making an environment for {name}, once: {made}", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(made)], check=True)
    install = [sys.executable, "-m", "pip", "--python", str(made / "bin" / "python"), "install", "--quiet"]
    said = subprocess.run(
        [*install, "--disable-pip-version-check", "--no-compile", *requirements], capture_output=True, text=True
    )
    if said.returncode != 0:
        raise RuntimeError(f"{name} cannot be installed ({', '.join(requirements)}): {said.stderr.strip()[-1000:]}")
    (made / DONE).write_text(told, encoding="utf-8")
    return made
