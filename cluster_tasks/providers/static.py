"""``local-static``: embeddings that know meanings and need no server: a vector for each of 32,000 pieces of words.

The package ``wordllama`` brings the vectors and the rules by which words are cut into pieces. Its two files are read
where they are installed, and nothing else of it is used: its code downloads what it misses, sets up logging where it is
imported, and pads all texts of a call to the longest.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cluster_tasks.errors import ConfigurationError
from cluster_tasks.providers.base import EmbeddingRequest, EmbeddingResult, Usage
from cluster_tasks.providers.local import check_model

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PACKAGE = "wordllama"
WEIGHTS, TENSOR = "weights/l2_supercat_256.safetensors", "embedding.weight"
TOKENIZER = "tokenizers/l2_supercat_tokenizer_config.json"
REMEDY = "install cluster-tasks[static]"
WORD = re.compile(r"\S{1,200}")
"""No piece reaches over a blank, so that words are cut one by one; what is longer is no word."""
WORDS_AT_ONCE = 1_000
"""The tokenizer keeps other threads, and so the heartbeat, waiting: for some milliseconds with so many words."""


class StaticEmbeddings:
    """Embeddings ``local-static``: the mean of the vectors of a text's pieces, of length 1, in 256 dimensions.

    They know which words mean the like, and nothing of their order; best in English. The same text has the same vector
    in every process. The model is read at the first use in a process, in a quarter of a second, and takes 50 MB there.

    Making one raises ConfigurationError if the package is not installed.
    """

    name = "local-static"

    def __init__(self) -> None:
        _folder()

    def embed(self, request: EmbeddingRequest) -> EmbeddingResult:
        """Embed the texts. Raises ConfigurationError if the request names another model or this one cannot be read."""
        check_model(request.model, self.name, "EMBEDDING")
        model = _model()
        counts = [model.count(text) for text in request.texts]
        pieces = int(sum(count.sum() for count in counts))
        return EmbeddingResult(
            vectors=np.stack([model.mean(count) for count in counts]),
            model=self.name,
            usage=Usage(prompt_tokens=pieces, total_tokens=pieces),
            provider=self.name,
        )

    def close(self) -> None:
        """Do nothing: there is nothing to release."""


@dataclass(frozen=True, slots=True)
class StaticModel:
    """The vectors of pieces of words, and what cuts words into them."""

    tokenizer: Tokenizer
    weights: NDArray[np.float16]
    """Shape (pieces, dimensions)."""

    def count(self, text: str) -> NDArray[np.int64]:
        """Return how often a text has each piece."""
        counts = np.zeros(len(self.weights), dtype=np.int64)
        words = WORD.findall(text)
        for start in range(0, len(words), WORDS_AT_ONCE):
            some = words[start : start + WORDS_AT_ONCE]
            encoded = self.tokenizer.encode(some, is_pretokenized=True, add_special_tokens=False)
            counts += np.bincount(np.asarray(encoded.ids, dtype=np.int64), minlength=len(counts))
        return counts

    def mean(self, counts: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the direction of the mean of the pieces' vectors."""
        pieces = np.flatnonzero(counts)
        # In double precision and without BLAS, whose order of summation is another on another machine.
        vector = np.einsum("i,ij->j", counts[pieces], self.weights[pieces].astype(np.float64))
        norm = float(np.linalg.norm(vector))
        if not norm:
            # A text without words still gets a direction, for cosine distances have no answer without one.
            vector[0] = norm = 1.0
        unit: NDArray[np.float32] = (vector / norm).astype(np.float32)
        return unit


def read_model(folder: Path) -> StaticModel:
    """Read the model that lies in the folder of the package. Raises ConfigurationError if that cannot be done."""
    # Most processes only send jobs, or embed by a server.
    from safetensors import SafetensorError
    from safetensors.numpy import load
    from tokenizers import Tokenizer

    try:
        weights = load((folder / WEIGHTS).read_bytes())[TENSOR]
        tokenizer = Tokenizer.from_buffer((folder / TOKENIZER).read_bytes())
    except (OSError, KeyError, ValueError, SafetensorError) as exc:
        raise ConfigurationError(f"the model of {PACKAGE} in {folder} cannot be read: {REMEDY} anew") from exc
    return StaticModel(tokenizer, weights)


_loading = Lock()
# A child that is forked meanwhile would wait for ever; so it is forked afterwards, and has the model.
os.register_at_fork(before=_loading.acquire, after_in_parent=_loading.release, after_in_child=_loading.release)


def _model() -> StaticModel:
    with _loading:
        return _model_of_this_process()


@cache
def _model_of_this_process() -> StaticModel:
    return read_model(_folder())


def _folder() -> Path:
    """Return where the package lies, without importing it. Raises ConfigurationError if it is not installed."""
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigurationError(f"the embeddings {StaticEmbeddings.name} need {PACKAGE}: {REMEDY}")
    return Path(spec.submodule_search_locations[0])
