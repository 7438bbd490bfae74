"""Where the node's runtime is: the top-level package ``workers``, which this package starts and never imports."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path

from cluster_tasks.errors import ConfigurationError

RUNTIME = Path(__file__).parents[1] / "workers"


def check_runtime(first: Sequence[str] = ()) -> None:
    """Raise ConfigurationError if Python, looking into the folders ``first`` at first, finds another ``workers``.

    Or if it has imported another: Celery looks for apps and tasks in the current folder, also where that is on no path.
    """
    found = [PathFinder.find_spec("workers", [*first, *sys.path])]
    if "workers" in sys.modules:
        found.append(sys.modules["workers"].__spec__)
    for spec in found:
        if spec is None or spec.origin is None or Path(spec.origin).parent != RUNTIME:
            place = (spec.origin or "a folder without __init__.py") if spec else "nothing"
            raise ConfigurationError(
                f"the node's runtime is the top-level package 'workers' at {RUNTIME}, but Python finds {place}: "
                "rename the other package, or start from a folder where it does not come first"
            )
