"""What holds for all embeddings that are computed on the node."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from cluster_tasks.errors import ConfigurationError
from cluster_tasks.providers import EmbeddingProvider, EmbeddingRequest, embedding_provider
from cluster_tasks.settings import ClusterSettings
from tests.servers import missing

DIMENSIONS = {"local-hash": 384, "local-static": 256}
PROGRAM = """
import sys
from cluster_tasks.providers import EmbeddingRequest, embedding_provider
from cluster_tasks.settings import ClusterSettings
provider = embedding_provider(ClusterSettings(embedding_model=sys.argv[1]))
sys.stdout.write(provider.embed(EmbeddingRequest(texts=("grüße from a node",))).vectors.astype("<f4").tobytes().hex())
"""


@pytest.fixture(params=DIMENSIONS, scope="module")
def provider(request: pytest.FixtureRequest) -> EmbeddingProvider:
    if request.param == "local-static" and find_spec("wordllama") is None:
        missing("wordllama is not installed: cluster-tasks[static]")
    return embedding_provider(ClusterSettings(embedding_model=request.param))


def vectors_of(provider: EmbeddingProvider, *texts: str) -> NDArray[np.float32]:
    return provider.embed(EmbeddingRequest(texts=texts)).vectors


def assert_units(vectors: NDArray[np.float32]) -> None:
    assert vectors.dtype == np.float32
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-5)


@given(texts=st.lists(st.text(), min_size=1, max_size=5))
def test_every_text_has_a_finite_float32_vector_of_length_one(provider: EmbeddingProvider, texts: list[str]) -> None:
    vectors = vectors_of(provider, *texts)
    assert vectors.shape == (len(texts), DIMENSIONS[provider.name])
    assert_units(vectors)


def test_a_text_without_words_has_a_vector_too(provider: EmbeddingProvider) -> None:
    assert_units(vectors_of(provider, "", " \n\t ", "\0", "\u200b", "\u2028", "😀"))


@pytest.mark.parametrize("text", ["one two three " * 100_000, "a" * 1_000_000, "的天空" * 100_000])
def test_a_text_of_a_million_characters_has_one_beside_others(provider: EmbeddingProvider, text: str) -> None:
    vectors = vectors_of(provider, text, *["short"] * 63)
    assert_units(vectors)
    assert np.array_equal(vectors[1:], np.repeat(vectors_of(provider, "short"), 63, axis=0))


@pytest.mark.parametrize(
    ("text", "near", "far"),
    [
        ("how do I restart a worker", "restarting a worker", "the capital of France is Paris"),
        ("Zugverspätung in München", "zugverspätungen in münchen", "Wetter in Hamburg"),
        ("分布式任务队列", "任务队列", "天气很好"),
    ],
)
def test_similar_texts_score_higher(provider: EmbeddingProvider, text: str, near: str, far: str) -> None:
    asked, close, distant = vectors_of(provider, text, near, far)
    assert float(asked @ close) > float(asked @ distant) + 0.1


def test_spacing_makes_no_difference(provider: EmbeddingProvider) -> None:
    plain, other = vectors_of(provider, "restart the worker", "  restart the\n\n\tworker ")
    assert np.array_equal(plain, other)


def test_a_vector_does_not_depend_on_its_neighbours(provider: EmbeddingProvider) -> None:
    assert np.array_equal(vectors_of(provider, "a b", "c d " * 999)[0], vectors_of(provider, "a b")[0])


def test_threads_may_share_one(provider: EmbeddingProvider) -> None:
    texts = [f"text number {number} of many" for number in range(200)]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda text: vectors_of(provider, text)[0], texts))
    assert np.array_equal(found, vectors_of(provider, *texts))


@pytest.mark.parametrize("seed", ["0", "1"])
def test_another_process_makes_the_same_vectors(provider: EmbeddingProvider, seed: str) -> None:
    env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", PROGRAM, provider.name]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert bytes.fromhex(done.stdout) == vectors_of(provider, "grüße from a node").astype("<f4").tobytes()


def test_a_result_says_what_made_it_and_what_it_took(provider: EmbeddingProvider) -> None:
    result = provider.embed(EmbeddingRequest(texts=("one two", "three")))
    assert result.model == result.provider == provider.name
    assert result.usage.total_tokens == result.usage.prompt_tokens == 3


def test_another_model_is_not_silently_replaced(provider: EmbeddingProvider) -> None:
    [other] = DIMENSIONS.keys() - {provider.name}
    for model in ("big-embedding", other):
        with pytest.raises(ConfigurationError, match=f"{model}.*CLUSTER_EMBEDDING_BASE_URL.*only {provider.name}"):
            provider.embed(EmbeddingRequest(texts=("a",), model=model))


def test_closing_is_safe_to_repeat(provider: EmbeddingProvider) -> None:
    provider.close()
    provider.close()
    assert_units(vectors_of(provider, "still there"))
