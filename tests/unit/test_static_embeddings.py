"""``local-static``: what it knows, how it is loaded, and what it says if it cannot be."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from cluster_tasks.errors import ConfigurationError
from cluster_tasks.providers import EmbeddingRequest, StaticEmbeddings, embedding_provider, static
from cluster_tasks.settings import ClusterSettings
from tests.servers import missing

EMBED = """
import logging, os, socket, sys, threading
from cluster_tasks.providers import EmbeddingRequest, StaticEmbeddings
provider = StaticEmbeddings()
def embed():
    return provider.embed(EmbeddingRequest(texts=("a text",))).vectors.tobytes()
"""


@pytest.fixture(autouse=True)
def _installed(request: pytest.FixtureRequest) -> None:
    if find_spec("wordllama") is None and "without" not in request.node.name:
        missing("wordllama is not installed: cluster-tasks[static]")


def run(program: str) -> str:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", EMBED + program], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("text", "near", "far"),
    [
        ("the car does not start", "my automobile will not turn on", "the cake does not rise"),
        ("remove a directory", "delete folders", "remove a comment"),
        ("fast", "quick", "slow cooking recipes"),
    ],
)
def test_texts_that_mean_the_like_are_near_without_a_word_in_common(text: str, near: str, far: str) -> None:
    asked, close, distant = StaticEmbeddings().embed(EmbeddingRequest(texts=(text, near, far))).vectors
    assert float(asked @ close) > float(asked @ distant)


def test_stored_vectors_stay_valid_for_later_releases() -> None:
    # Collections hold these vectors: another model, or another release of it, must be given another name.
    [vector] = StaticEmbeddings().embed(EmbeddingRequest(texts=("A node takes jobs, whatever they hold.",))).vectors
    assert vector[:6] == pytest.approx([-0.0248, -0.0161, 0.1317, -0.047, -0.0187, 0.1164], abs=1e-4)


def test_a_text_is_cut_as_the_tokenizer_cuts_the_whole_of_it() -> None:
    model = static._model()
    for text in ("Grüße, naïve co-operation: x_1 == 2**10 or <tag/> 分布式 😀", "of a very-very-long-word." * 30):
        whole = model.tokenizer.encode(text, add_special_tokens=False).ids
        assert np.array_equal(model.count(text), np.bincount(whole, minlength=len(model.weights)))


def test_it_is_chosen_by_its_name() -> None:
    assert embedding_provider(ClusterSettings(embedding_model="local-static")).name == "local-static"


def test_a_misspelt_name_is_told_the_right_one() -> None:
    with pytest.raises(ConfigurationError, match=r"local-hash or local-static; did you mean 'local-static'\?"):
        embedding_provider(ClusterSettings(embedding_model="local-statik"))


def test_nothing_is_loaded_before_it_is_needed_and_nothing_but_the_model_then() -> None:
    told = run("""
heavy = ("tokenizers", "safetensors")
print([name for name in heavy if name in sys.modules])
embed()
print([name for name in heavy if name in sys.modules])
print([name for name in ("wordllama", "requests", "huggingface_hub") if name in sys.modules], logging.root.handlers)
""")
    assert told.splitlines() == ["[]", "['tokenizers', 'safetensors']", "[] []"]


def test_no_connection_is_made() -> None:
    told = run("""
sys.addaudithook(lambda event, args: event.startswith("socket.") and sys.exit(f"{event} {args}"))
print(len(embed()))
""")
    assert told == "1024\n"


def test_the_model_is_read_once_by_many_threads() -> None:
    told = run("""
opened = []
sys.addaudithook(lambda event, args: event == "open" and str(args[0]).endswith("safetensors") and opened.append(1))
threads = [threading.Thread(target=embed) for _ in range(16)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(len(opened))
""")
    assert told == "1\n"


def test_a_child_that_is_forked_while_the_model_is_read_embeds() -> None:
    told = run("""
for _ in range(5):
    from cluster_tasks.providers import static
    static._model_of_this_process.cache_clear()
    reading = threading.Event()
    sys.addaudithook(lambda event, args: event == "open" and str(args[0]).endswith("safetensors") and reading.set())
    thread = threading.Thread(target=embed)
    thread.start()
    reading.wait()
    child = os.fork()
    if not child:
        os._exit(len(embed()) != 1024)
    assert os.waitpid(child, 0)[1] == 0
    thread.join()
print("done")
""")
    assert told == "done\n"


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wordllama", None)
    with pytest.raises(ConfigurationError, match=r"need wordllama: install cluster-tasks\[static\]"):
        embedding_provider(ClusterSettings(embedding_model="local-static"))


@pytest.mark.parametrize("file", [static.WEIGHTS, static.TOKENIZER])
@pytest.mark.parametrize("content", [None, b"", b"{}", b"\x10\0\0\0\0\0\0\0{}              "])
def test_a_model_that_cannot_be_read_is_named(tmp_path: Path, file: str, content: bytes | None) -> None:
    shutil.copytree(static._folder(), tmp_path / "model", ignore=shutil.ignore_patterns("*.so", "*.c", "*.cpp"))
    broken = tmp_path / "model" / file
    broken.unlink()
    if content is not None:
        broken.write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"model cannot be read: install cluster-tasks\[static\] anew"):
        static.read_model(tmp_path / "model")
