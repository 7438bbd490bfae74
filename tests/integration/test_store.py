"""Collections on a real LanceDB in a temporary folder, beyond what the contract of all stores says."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cluster_tasks.errors import CollectionMismatch, CollectionNotFound, InvalidArguments, StoreUnavailable
from cluster_tasks.shards.database import VERSIONS_PER_COMPACTION, Database
from cluster_tasks.shards.documents import KEY, MAX_INTEGER, Document, Mode, decode_metadata, encode_metadata
from cluster_tasks.shards.filters import compile_where
from cluster_tasks.shards.fusion import combine
from cluster_tasks.shards.store import CollectionStore

if TYPE_CHECKING:
    from lancedb.table import Table

ROOT = Path(__file__).parents[2]
MODEL = "model-a"


@pytest.fixture
def store(tmp_path: Path) -> CollectionStore:
    return CollectionStore(str(tmp_path / "data"))


@pytest.fixture
def database(tmp_path: Path) -> Database:
    """The tables of ``store``."""
    return Database(str(tmp_path / "data"))


def add(store: CollectionStore, *documents: Document, collection: str = "docs") -> int:
    return store.upsert(collection, documents, np.ones((len(documents), 3)), MODEL)


def found_ids(store: CollectionStore, where: dict[str, Any] | None = None) -> set[str]:
    return {passage.id for passage in store.search("docs", np.ones(3), 1000, where)}


# What a document is.


def test_a_missing_id_is_derived_from_text_and_metadata_in_any_order() -> None:
    one = Document(text="a", metadata={"x": 1, "y": "b"})
    same = Document.model_validate({"id": None, "metadata": {"y": "b", "x": 1}, "text": "a"})
    assert one.id == same.id == "5d177d780eb7503f11ed35771fe8db23"
    others = [Document(text="b"), Document(text="a"), Document(text="a", metadata={"x": "1", "y": "b"})]
    assert len({one.id, *(other.id for other in others)}) == 4
    assert Document(id="mine", text="a").id == "mine"


@pytest.mark.parametrize(
    "fields",
    [
        {"text": ""},
        {"text": "a", "id": ""},
        {"text": "a", "metadata": {"it's": 1}},
        {"text": "a", "metadata": {"": 1}},
        {"text": "a", "metadata": {"k": None}},
        {"text": "a", "metadata": {"k": [1]}},
        {"text": "a", "metadata": {"k": b"x"}},
        {"text": "a", "metadata": {"k": float("nan")}},
        {"text": "a", "metadata": {"k": MAX_INTEGER + 1}},
        {"text": "a", "metadata": {"k": "\ud800"}},
        {"text": "a", "extra": 1},
    ],
)
def test_a_document_that_could_not_be_stored_or_filtered_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Document.model_validate(fields)


values = (
    st.text()
    | st.booleans()
    | st.integers(-MAX_INTEGER, MAX_INTEGER)
    | st.floats(allow_nan=False, allow_infinity=False)
)


@given(st.dictionaries(st.from_regex(KEY, fullmatch=True), values))
def test_metadata_survives_its_encoding(metadata: dict[str, Any]) -> None:
    decoded = decode_metadata(encode_metadata(Document(text="a", metadata=metadata).metadata))
    assert decoded == metadata
    assert {key: type(value) for key, value in decoded.items()} == {key: type(v) for key, v in metadata.items()}


def test_a_collection_made_anew_has_nothing_of_the_old(store: CollectionStore, tmp_path: Path) -> None:
    other = CollectionStore(str(tmp_path / "data"))
    add(store, Document(id="old", text="t"))
    assert found_ids(other) == {"old"}
    store.drop("docs")
    store.upsert("docs", [Document(id="new", text="t")], np.ones((1, 5)), "model-b")
    assert [passage.id for passage in other.search("docs", np.ones(5), 5)] == ["new"]


def test_a_maker_that_died_midway_leaves_a_name_that_can_be_used(store: CollectionStore, tmp_path: Path) -> None:
    (tmp_path / "data" / "docs.g1.0of1.lance" / "data").mkdir(parents=True)
    with pytest.raises(CollectionNotFound):
        store.count("docs")
    assert add(store, Document(text="t")) == store.count("docs") == 1


def test_a_damaged_table_is_unavailable_and_not_empty(store: CollectionStore, tmp_path: Path) -> None:
    add(store, Document(text="t"))
    for file in (tmp_path / "data" / "docs.g1.0of1.lance" / "data").iterdir():
        file.write_bytes(b"")
    with pytest.raises(StoreUnavailable, match="docs"):
        store.search("docs", np.ones(3), 1)


# Search.


def test_texts_are_ordered_by_code_point(store: CollectionStore) -> None:
    texts = ["", "2", "2020", "A", "a", "é", "😀"]
    add(store, *(Document(id=str(row), text="t", metadata={"k": text}) for row, text in enumerate(texts)))
    add(store, Document(id="number", text="t", metadata={"k": 7}))
    for row, text in enumerate(texts):
        assert found_ids(store, {"k": {"lt": text}}) == {str(number) for number in range(row)}
        assert found_ids(store, {"k": {"gte": text}}) == {str(number) for number in range(row, len(texts))}


def test_an_unknown_operator_is_answered_with_the_nearest() -> None:
    with pytest.raises(InvalidArguments, match="'gtr'; did you mean 'gt'"):
        compile_where({"year": {"gtr": 1}})


@pytest.mark.parametrize("mode", ["vector", "text", "hybrid"])
@pytest.mark.parametrize("indexed", [True, False])
def test_what_nodes_find_apart_is_what_one_finds(tmp_path: Path, mode: Mode, indexed: bool) -> None:
    store = CollectionStore(str(tmp_path / "data"), shards=4)
    rng = np.random.default_rng(5)
    words = ["".join(rng.choice(list("abcdefgh"), 3)) for _ in range(60)]
    documents = [Document(id=f"{n:03}", text=" ".join(rng.choice(words, 12)), metadata={"n": n}) for n in range(300)]
    store.upsert("docs", documents, rng.normal(size=(300, 8)), MODEL)
    if indexed:
        store.optimize("docs")
    query, text, where = rng.normal(size=8), " ".join(words[:5]), {"n": {"gte": 50}}
    for k in (1, 10, 100):
        whole = store.search("docs", query, k, where, text=text, mode=mode)
        parts = [
            store.candidates("docs", query, k, where, text=text, mode=mode, shards=shards, generation=1)
            for shards in ([0, 2], [1], [3])
        ]
        assert combine(mode, parts, k) == whole
        assert len(whole) == k


# Compaction.


def fragments(database: Database) -> int:
    table = database.open("docs.g1.0of1")
    assert table is not None
    count: int = table.stats()["fragment_stats"]["num_fragments"]  # type: ignore[index]  # A dict, in fact.
    return count


def test_compaction_keeps_every_document_and_shortens_the_table(store: CollectionStore, database: Database) -> None:
    # The table and its index are two versions.
    for number in range(VERSIONS_PER_COMPACTION - 3):
        add(store, Document(id=str(number), text="t", metadata={"n": number}))
    assert fragments(database) > 40
    add(store, Document(id="last", text="t"))
    assert fragments(database) == 1
    assert len(found_ids(store)) == store.count("docs") == VERSIONS_PER_COMPACTION - 2
    assert found_ids(store, {"n": 7}) == {"7"}
    with pytest.raises(CollectionMismatch):
        store.search("docs", np.ones(3), 1, embedding_model="model-b")


def test_a_write_that_lost_the_race_is_repeated_on_the_newest_version(
    store: CollectionStore, database: Database
) -> None:
    for name in "abc":
        add(store, Document(id=name, text="t"))
    versions: list[int] = []

    def compact_too_late(table: Table) -> int:
        versions.append(table.version)
        if len(versions) == 1:
            store.delete("docs", ids=["b"])
        table.optimize()
        return table.version

    database.commit("docs.g1.0of1", compact_too_late)
    first, second = versions
    assert first < second
    assert found_ids(store) == {"a", "c"}


# Processes.


WRITER = """
import sys
import numpy as np
from cluster_tasks.shards.documents import Document
from cluster_tasks.shards.store import CollectionStore

store, writer = CollectionStore(sys.argv[1]), sys.argv[2]
store.collections()
print("ready", flush=True)
sys.stdin.readline()
for turn in range(int(sys.argv[3])):
    batch = [Document(id=f"shared-{turn}-{row}", text=f"{writer} {turn} {row}") for row in range(5)]
    batch.append(Document(id=f"{writer}-{turn}", text="own"))
    store.upsert("docs", batch, np.ones((6, 3)), "model-a")
"""


def start(stack: ExitStack, script: str, *args: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *map(str, args)]
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    stack.enter_context(process)
    stack.callback(process.kill)
    return process


def release(*writers: subprocess.Popen[str]) -> None:
    """Let the writers go once all are ready, and wait for them."""
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("\n")
        writer.stdin.flush()
    assert [writer.wait(60) for writer in writers] == [0] * len(writers)


def test_writers_at_once_lose_nothing_and_double_nothing(store: CollectionStore, tmp_path: Path) -> None:
    with ExitStack() as stack:
        release(*(start(stack, WRITER, tmp_path / "data", writer, 6) for writer in range(4)))
    passages = store.search("docs", np.ones(3), 1000)
    expected = {f"shared-{turn}-{row}" for turn in range(6) for row in range(5)}
    expected |= {f"{writer}-{turn}" for turn in range(6) for writer in range(4)}
    assert sorted(passage.id for passage in passages) == sorted(expected)
    assert store.count("docs") == len(expected)
    for passage in passages:
        if passage.id.startswith("shared"):
            assert passage.id.split("-")[1:] == passage.text.split()[1:]


def test_a_reader_sees_what_another_process_wrote(store: CollectionStore, tmp_path: Path) -> None:
    add(store, Document(id="first", text="t"))
    assert found_ids(store) == {"first"}
    with ExitStack() as stack:
        release(start(stack, WRITER, tmp_path / "data", "w", 1))
    assert found_ids(store) == {"first", "w-0", *(f"shared-0-{row}" for row in range(5))}


FORKER = """
import os, sys, warnings
import numpy as np
from cluster_tasks.errors import StoreUnavailable
from cluster_tasks.shards.documents import Document
from cluster_tasks.shards.store import CollectionStore

warnings.simplefilter("ignore", RuntimeWarning)  # LanceDB warns of every fork that follows its import.
store = CollectionStore(sys.argv[1])
store.upsert("docs", [Document(id="parent", text="t")], np.ones((1, 3)), "model-a")
child = os.fork()
if not child:
    try:
        store.search("docs", np.ones(3), 5)
    except StoreUnavailable:
        os._exit(0)
    finally:
        os._exit(1)
assert os.waitpid(child, 0)[1] == 0
assert len(store.search("docs", np.ones(3), 5)) == 1
"""


def test_a_child_of_a_process_that_used_the_store_is_refused(store: CollectionStore, tmp_path: Path) -> None:
    with ExitStack() as stack:
        assert start(stack, FORKER, tmp_path / "data").wait(60) == 0
    assert found_ids(store) == {"parent"}


def test_the_modules_load_no_lancedb_before_a_store_is_used() -> None:
    script = (
        "import sys; from cluster_tasks.shards.store import CollectionStore; CollectionStore('data');"
        "print({'lancedb', 'pyarrow'} & set(sys.modules))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert result.stdout == "set()\n"
