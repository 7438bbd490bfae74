"""Providers that need no package, no download and no server. They are lexical: they compare words, not meaning.

``local-hash`` embeds by hashed n-grams, ``local-extractive`` answers with sentences of the given passages,
``local-mmr`` reranks what repeats itself.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain, pairwise
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from cluster_tasks.errors import ConfigurationError, ProviderError
from cluster_tasks.providers.base import (
    ChatRequest,
    ChatResult,
    EmbeddingRequest,
    EmbeddingResult,
    Quote,
    Rank,
    RerankRequest,
    RerankResult,
    Tell,
    Usage,
)
from cluster_tasks.providers.sentences import sentence_spans

WORD = re.compile(r"\w+")
FILLED = re.compile(r"\S+")
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""2^64 divided by the golden ratio: the multiplier of Fibonacci hashing (Knuth, TAOCP vol. 3, section 6.4)."""

GRAM_SIZES = (3, 4)
MANY = 4
"""From so many texts on their grams are hashed by numpy."""
CRC_TABLE = np.array([crc32(bytes([byte ^ 0xFF])) ^ 0xFF000000 for byte in range(256)], dtype=np.uint32)
"""Of the CRC-32 of zlib: what is left of a byte after its eight steps."""


def words_of(text: str) -> list[str]:
    """The words of ``text``, in order, without regard to case and to the form of characters (NFKC)."""
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold())


class HashEmbeddings:
    """Embeddings ``local-hash``: words, pairs of words and character 3- and 4-grams, hashed with a sign.

    The same text has the same vector in every process and on every platform. Vectors are float32 of length 1.
    Signed feature hashing follows Weinberger et al., "Feature Hashing for Large Scale Multitask Learning" (2009).
    """

    name = "local-hash"

    def __init__(self, dimensions: int = 384) -> None:
        if dimensions < 1:
            raise ConfigurationError(f"dimensions={dimensions}: expected at least 1")
        self.dimensions = dimensions

    def embed(self, request: EmbeddingRequest) -> EmbeddingResult:
        """Embed the texts. Raises ConfigurationError if the request names another model."""
        check_model(request.model, self.name, "EMBEDDING")
        count = sum(len(text.split()) for text in request.texts)
        usage = Usage(prompt_tokens=count, total_tokens=count)
        return EmbeddingResult(vectors=self._vectors(request.texts), model=self.name, usage=usage, provider=self.name)

    def _vectors(self, texts: Sequence[str]) -> NDArray[np.float32]:
        # All texts at once: for one that is short, to call numpy costs more than what it does.
        words = [words_of(text) for text in texts]
        pairs = [[f"{left} {right}" for left, right in pairwise(own)] for own in words]
        whole = _hashes([own + joined for own, joined in zip(words, pairs, strict=True)])
        grams = _gram_hashes([f" {' '.join(own)} " for own in words])
        # A text has many times more character n-grams than words: half the weight keeps whole words ahead.
        vectors = self._hashed(*whole, len(texts)) + 0.5 * self._hashed(*grams, len(texts))
        # Each row by itself: sums over an axis are rounded in another order, which would show.
        norms = np.sqrt([row.dot(row) for row in vectors])
        # A text without words still gets a direction, for cosine distances have no answer without one.
        vectors[norms == 0, 0] = norms[norms == 0] = 1.0
        unit: NDArray[np.float32] = (vectors / norms[:, np.newaxis]).astype(np.float32)
        return unit

    def _hashed(self, texts: NDArray[np.uint64], hashes: NDArray[np.uint64], count: int) -> NDArray[np.float64]:
        """A row for each of ``count`` texts; of each feature its hash, and which text has it."""
        distinct, counts = np.unique(texts << np.uint64(32) | hashes, return_counts=True)
        # CRC-32 is linear, so that similar words collide by rule; the product spreads them.
        mixed = (distinct & np.uint64(0xFFFFFFFF)) * GOLDEN
        signs = np.where(mixed >> np.uint64(31) & np.uint64(1), 1.0, -1.0)
        buckets = (mixed >> np.uint64(32)) % np.uint64(self.dimensions)
        places = (distinct >> np.uint64(32)) * np.uint64(self.dimensions) + buckets
        weights = signs * (1.0 + np.log(counts))
        rows = np.bincount(places.astype(np.int64), weights, minlength=count * self.dimensions)
        return rows.astype(np.float64, copy=False).reshape(count, self.dimensions)

    def close(self) -> None:
        """Do nothing: there is nothing to release."""


def _hashes(features: Sequence[Sequence[str]]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """CRC-32 of the features of each text, and which text each is of."""
    lengths = [len(own) for own in features]
    encoded = map(str.encode, chain.from_iterable(features))
    hashes = np.fromiter(map(crc32, encoded), dtype=np.uint64, count=sum(lengths))
    return np.repeat(np.arange(len(features), dtype=np.uint64), lengths), hashes


def _gram_hashes(texts: Sequence[str]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """The same of the character 3- and 4-grams of each text."""
    if len(texts) >= MANY and all(text.isascii() for text in texts):
        data = np.frombuffer("".join(texts).encode(), dtype=np.uint8)
        owners = np.repeat(np.arange(len(texts), dtype=np.uint64), [len(text) for text in texts])
        found = [_window_hashes(data, owners, size) for size in GRAM_SIZES]
        return np.concatenate([own for own, _ in found]), np.concatenate([hashes for _, hashes in found])
    return _hashes(
        [[text[start : start + size] for size in GRAM_SIZES for start in range(len(text) - size + 1)] for text in texts]
    )


def _window_hashes(
    data: NDArray[np.uint8], owners: NDArray[np.uint64], size: int
) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """The owner and the CRC-32 of all windows of ``size`` bytes that have one owner."""
    count = max(len(data) - size + 1, 0)
    crc = np.full(count, 0xFFFFFFFF, dtype=np.uint32)
    for offset in range(size):
        crc = CRC_TABLE[(crc ^ data[offset : offset + count]) & 0xFF] ^ (crc >> np.uint32(8))
    is_whole = owners[:count] == owners[size - 1 : size - 1 + count]
    return owners[:count][is_whole], (crc[is_whole] ^ np.uint32(0xFFFFFFFF)).astype(np.uint64)


class ExtractiveChat:
    """Answers ``local-extractive``: the sentences of the passages that fit the question best, in their order.

    The question is the last user message. Sentences are ranked by Okapi BM25 (Robertson and Zaragoza, "The
    Probabilistic Relevance Framework", 2009) over the passages; those that reach half of the best score are taken
    while they fit into ``max_tokens`` words. Without a word in common the answer is empty. Usage counts words.
    ``quotes`` says where each sentence is from.
    """

    name = "local-extractive"
    default_max_words = 150

    def chat(self, request: ChatRequest) -> ChatResult:
        """Answer from ``request.passages``; sampling parameters do not apply.

        Raises ConfigurationError where only a language model could answer: without passages, for tools, for a
        response format or for a model of another name. Raises ProviderError if there is no user message.
        """
        return self.stream(request, lambda _: None)

    def stream(self, request: ChatRequest, tell: Tell) -> ChatResult:
        """Answer as ``chat`` does, and tell one sentence after the other."""
        check_model(request.model, self.name, "LLM")
        if not request.passages:
            raise _needs_model("a prompt without passages")
        if request.tools or request.response_format:
            raise _needs_model("a request with tools or a response format")
        sentences = _sentences(request.passages)
        scores = _bm25(_stems(_question(request)), [_stems(sentence.text) for sentence in sentences])
        most = request.max_tokens or self.default_max_words
        chosen, cut = _best(sentences, scores, most, request.passages)
        text = " ".join(sentence.text for sentence in chosen)
        for number, sentence in enumerate(chosen):
            tell(f" {sentence.text}" if number else sentence.text)
        asked = _count([*(text_of(message) for message in request.messages), *request.passages])
        answered = _count([text])
        return ChatResult(
            text=text,
            model=self.name,
            usage=Usage(prompt_tokens=asked, completion_tokens=answered, total_tokens=asked + answered),
            finish_reason="length" if cut else "stop",
            provider=self.name,
            quotes=_quotes(chosen),
        )

    def close(self) -> None:
        """Do nothing: there is nothing to release."""


class MarginalRelevance:
    """Rankings ``local-mmr``: as the search found it, but what repeats itself behind what says something else.

    Each place is given to the text with the greatest ``balance`` × relevance − (1 − ``balance``) × redundancy, which is
    its score: maximal marginal relevance (Carbonell and Goldstein, "The Use of MMR, Diversity-Based Reranking for
    Reordering Documents and Producing Summaries", SIGIR 1998). Relevance is the score of the search, from 0 for the
    least of the texts to 1 for the best; redundancy the greatest cosine similarity to a text placed before, by
    ``local-hash``: words in common. The query is not read: nothing fits it better afterwards.
    """

    name = "local-mmr"
    balance = 0.7

    def rerank(self, request: RerankRequest) -> RerankResult:
        """Rank the texts. Raises ConfigurationError if the request names another model."""
        check_model(request.model, self.name, "RERANK")
        vectors = HashEmbeddings().embed(EmbeddingRequest(texts=request.texts)).vectors
        relevance, redundancy = _scaled(request.scores), np.zeros(len(request.texts))
        ranking: list[Rank] = []
        for _ in range(min(request.top, len(request.texts))):
            values = self.balance * relevance - (1 - self.balance) * redundancy
            values[[rank.index for rank in ranking]] = -np.inf
            best = int(values.argmax())
            ranking.append(Rank(index=best, score=float(values[best])))
            redundancy = np.maximum(redundancy, vectors @ vectors[best])
        return RerankResult(ranking=ranking, model=self.name, provider=self.name)

    def close(self) -> None:
        """Do nothing: there is nothing to release."""


def text_of(message: Any) -> str:
    """The text of a chat message, whose content is a string, a list of parts, or missing."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part.get("type") == "text")


def check_model(asked: str | None, name: str, purpose: str) -> None:
    """Raise ConfigurationError if a request asks for another model than the local one of this ``name``."""
    if asked not in (None, name):
        raise ConfigurationError(f"model {asked!r} needs CLUSTER_{purpose}_BASE_URL: without it there is only {name}")


def _needs_model(what: str) -> ConfigurationError:
    return ConfigurationError(
        f"local-extractive cannot answer {what}: configure a language model with CLUSTER_LLM_BASE_URL and "
        "CLUSTER_LLM_MODEL"
    )


def _question(request: ChatRequest) -> str:
    asked = next((message for message in reversed(request.messages) if message["role"] == "user"), None)
    if asked is None:
        raise ProviderError("local-extractive found no user message to answer")
    return text_of(asked)


class _Sentence(NamedTuple):
    text: str
    """With single blanks between its words."""
    passage: int
    """Its number, from 0."""
    start: int
    end: int

    def shortened(self, passages: Sequence[str], words: int) -> _Sentence:
        found = list(FILLED.finditer(passages[self.passage], self.start, self.end))[:words]
        return self._replace(text=" ".join(word[0] for word in found), end=found[-1].end())


def _sentences(passages: Sequence[str]) -> list[_Sentence]:
    sentences: dict[str, _Sentence] = {}
    for number, passage in enumerate(passages):
        for start, end in sentence_spans(passage):
            text = " ".join(passage[start:end].split())
            # Chunks of a document overlap: a sentence counts once.
            sentences.setdefault(text, _Sentence(text, number, start, end))
    return list(sentences.values())


def _quotes(sentences: Iterable[_Sentence]) -> list[Quote]:
    quotes, start = [], 0
    for text, passage, passage_start, passage_end in sentences:
        end = start + len(text)
        quotes.append(
            Quote(start=start, end=end, passage=passage + 1, passage_start=passage_start, passage_end=passage_end)
        )
        start = end + 1
    return quotes


def _scaled(scores: Sequence[float]) -> NDArray[np.float64]:
    array = np.asarray(scores, dtype=np.float64)
    spread = np.ptp(array)
    return (array - array.min()) / spread if spread else np.ones(len(array))


def _stems(text: str) -> list[str]:
    # Inflections of a word share its first letters in many languages; six keep most words apart.
    return [word[:6] for word in words_of(text)]


def _bm25(question: Iterable[str], sentences: Sequence[Sequence[str]], k1: float = 1.2, b: float = 0.75) -> list[float]:
    counts = [Counter(sentence) for sentence in sentences]
    found_in = Counter(stem for count in counts for stem in count)
    mean = sum(map(len, sentences)) / max(1, len(sentences)) or 1.0
    weights = {
        stem: math.log(1 + (len(sentences) - found_in[stem] + 0.5) / (found_in[stem] + 0.5))
        for stem in dict.fromkeys(question)
    }
    return [
        sum(
            weight * count[stem] * (k1 + 1) / (count[stem] + k1 * (1 - b + b * count.total() / mean))
            for stem, weight in weights.items()
        )
        for count in counts
    ]


def _best(
    sentences: Sequence[_Sentence], scores: Sequence[float], max_words: int, passages: Sequence[str]
) -> tuple[list[_Sentence], bool]:
    """The chosen sentences in their order, and whether the limit left one out or cut one short."""
    best = max(scores, default=0.0)
    ranked = [i for i in sorted(range(len(scores)), key=lambda i: -scores[i]) if best and scores[i] >= best / 2]
    chosen: list[int] = []
    left = max_words
    for i in ranked:
        size = _count([sentences[i].text])
        if size > left:
            break
        chosen.append(i)
        left -= size
    if ranked and not chosen:
        return [sentences[ranked[0]].shortened(passages, max_words)], True
    return [sentences[i] for i in sorted(chosen)], len(chosen) < len(ranked)


def _count(texts: Iterable[str]) -> int:
    return sum(len(text.split()) for text in texts)
