"""Vectors as they are stored and compared: of length 1, so that cosine similarity is a dot product."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster_tasks.errors import InvalidArguments

Vectors = NDArray[np.floating[Any]]


def unit_rows(vectors: Vectors, rows: int) -> NDArray[np.float32]:
    """Scale each row to length 1; a zero row stays zero. Raises InvalidArguments unless ``rows`` finite vectors."""
    array = np.asarray(vectors, dtype=np.float64)
    if array.ndim != 2 or len(array) != rows or not array.size:
        raise InvalidArguments(f"vectors of shape {array.shape} do not give {rows} documents one vector each")
    lengths = np.linalg.norm(array, axis=1, keepdims=True)
    if not np.isfinite(lengths).all():
        raise InvalidArguments("vectors must be finite")
    units = np.zeros(array.shape, dtype=np.float32)
    np.divide(array, lengths, out=units, where=lengths > 0, casting="same_kind")
    return units


def similarity(score: float) -> float:
    """Return a cosine similarity that rounding may have taken a little beyond -1 or 1."""
    return min(1.0, max(-1.0, score))
