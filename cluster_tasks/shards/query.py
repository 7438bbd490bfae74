"""What a collection is searched for, checked before any store is asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self, get_args

import numpy as np
from numpy.typing import NDArray

from cluster_tasks.errors import InvalidArguments, did_you_mean
from cluster_tasks.shards.documents import Mode
from cluster_tasks.shards.filters import Condition, Where, conditions_of
from cluster_tasks.shards.vectors import Vectors, unit_rows

MAX_K = 10_000


@dataclass(frozen=True, slots=True)
class Query:
    """What is searched for."""

    mode: Mode
    k: int
    vector: NDArray[np.float32]
    """Of length 1; empty where the mode needs none."""
    text: str
    conditions: tuple[Condition, ...]
    """What documents must meet."""

    @classmethod
    def of(cls, vector: Vectors | None, text: str | None, k: int, where: Where | None, mode: Mode | None) -> Self:
        """Check what was asked for. ``mode`` None: what there is to search with decides. Raises InvalidArguments."""
        if not 1 <= k <= MAX_K:
            raise InvalidArguments(f"k={k} is not between 1 and {MAX_K}")
        if mode is None:
            mode = "hybrid" if vector is not None and text else "text" if vector is None else "vector"
        if mode not in get_args(Mode):
            raise InvalidArguments(f"unknown mode {mode!r}{did_you_mean(str(mode), get_args(Mode))}")
        if mode != "text" and vector is None:
            raise InvalidArguments(f"mode={mode!r} needs a vector")
        if mode != "vector":
            _check_text(mode, text)
        array = np.zeros((1, 0)) if mode == "text" or vector is None else np.asarray(vector)[np.newaxis]
        unit = array[0].astype(np.float32) if mode == "text" else unit_rows(array, rows=1)[0]
        return cls(mode, k, unit, text or "", tuple(conditions_of(where or {})))


def _check_text(mode: Mode, text: str | None) -> None:
    if not text:
        raise InvalidArguments(f"mode={mode!r} needs a text")
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        raise InvalidArguments(f"text: {exc}") from None
