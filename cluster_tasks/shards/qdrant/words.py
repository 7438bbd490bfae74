"""Texts as sparse vectors of their words, so that Qdrant ranks by BM25 without any model.

A word is a run of letters and digits without case and accents, reduced to its English stem; the commonest are left out.
Its dimension is a hash of 32 bits: among 100,000 words one shares it with another, and counts as the same. Its value in
a document is BM25's weight of its frequency; Qdrant multiplies it by the word's rarity in the collection (its modifier
``idf``), which it counts itself. BM25 also asks for the mean length of all documents, which nobody knows while they are
stored: MEAN_WORDS stands for it, and a wrong guess only makes length count a little more or less.
"""

from __future__ import annotations

import re
import threading
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import snowballstemmer

K1, B = 1.2, 0.75
"""Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond", 2009, section 3."""
MEAN_WORDS = 100
"""About what a passage of 1,000 characters has, without those that are left out."""
WORD = re.compile(r"[^\W_]+")
COMMONEST = frozenset({
    "a", "an", "and", "are", "as", "at", "be", "but", "by", "for", "if", "in", "into", "is", "it", "no", "not", "of",
    "on", "or", "such", "that", "the", "their", "then", "there", "these", "they", "this", "to", "was", "will", "with",
})  # fmt: skip

_own = threading.local()


def document_vector(text: str) -> Mapping[int, float]:
    """Return dimension → value of a text that is stored; nothing for one without words."""
    counts = Counter(_dimensions(text))
    length = B * counts.total() / MEAN_WORDS + 1 - B
    return {dimension: count * (K1 + 1) / (count + K1 * length) for dimension, count in counts.items()}


def query_vector(text: str) -> Mapping[int, float]:
    """Return dimension → value of a text that is searched for: each of its words once."""
    return dict.fromkeys(_dimensions(text), 1.0)


def _dimensions(text: str) -> Iterator[int]:
    folded = text if text.isascii() else _without_accents(text)
    return (_dimension(word) for word in WORD.findall(folded.lower()) if word not in COMMONEST)


def _without_accents(text: str) -> str:
    decomposed = unicodedata.normalize("NFKD", text.casefold())
    return "".join(character for character in decomposed if not unicodedata.combining(character))


@lru_cache(maxsize=1 << 16)
def _dimension(word: str) -> int:
    return int.from_bytes(blake2b(_stemmer().stemWord(word).encode(), digest_size=4).digest(), "big")


def _stemmer() -> Any:
    # One keeps the word that it is at: threads cannot share it.
    if not hasattr(_own, "stemmer"):
        _own.stemmer = snowballstemmer.stemmer("english")
    return _own.stemmer
