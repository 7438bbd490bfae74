"""``cluster-tasks index`` with a real node: what is in the collection after a run, the next, and one that broke off."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from cluster_tasks.tasks import retrieval
from cluster_tasks.testing import FakeOpenAI
from tests.documents import pdf
from tests.integration.ready_made import ROOT, WITHIN_S, Run, log_of, node, sender
from tests.servers import redis_for_results
from tests.waiting import wait_until
from workers.redis_server import free_port

DECLARED = (retrieval,)
"""An app knows the jobs of the modules that its process has imported."""
GUIDE = "# Guide\n\n" + "".join(f"## Step {n}\n\n{f'Do the thing number {n}. ' * 12}\n\n" for n in range(12))
FILES: dict[str, bytes] = {
    "guide.md": GUIDE.encode(),
    "notes/hen.txt": b"A hen lays eggs.",
    "notes/page.html": b"<title>Cats</title><p>A cat sleeps.",
    "paper.pdf": pdf("The sky is blue.", "Air scatters light."),
    "tool.py": b"def hammer():\n    return 'nail'\n",
}
UNREADABLE = {"empty.txt": b"\n", "latin.txt": b"caf\xe9", "locked.pdf": pdf("secret", password="x")}


class Folder:
    """A folder of the test, and the command that indexes it into a collection of its own."""

    def __init__(self, path: Path, collection: str, variables: Mapping[str, str], run: Run) -> None:
        self.path, self.collection, self.variables, self.run = path, collection, variables, run

    def write(self, files: Mapping[str, bytes]) -> None:
        for name, data in files.items():
            (self.path / name).parent.mkdir(parents=True, exist_ok=True)
            (self.path / name).write_bytes(data)

    def start(self, *words: str, **variables: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "cluster_tasks.cli.main", "index", str(self.path)]
        return subprocess.Popen(
            [*command, "--collection", self.collection, *words],
            env={**os.environ, **self.variables, **variables},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(self, process: subprocess.Popen[str], exit_code: int) -> tuple[str, str]:
        """Return what a command says when it ends."""
        said, complained = process.communicate(timeout=2 * WITHIN_S)
        assert process.returncode == exit_code, complained
        assert "Traceback" not in complained
        return said, complained

    def index(self, *words: str, exit_code: int = 0, **variables: str) -> Any:
        """Run the command with --json; return its report."""
        return json.loads(self.end(self.start("--json", *words, **variables), exit_code)[0])

    def held(self) -> dict[str, dict[str, Any]]:
        """What the collection holds of documents, by id."""
        listed = self.run("retrieval.list_documents", self.collection)
        assert listed["next"] is None
        return {document["id"]: document for document in listed["documents"]}

    def passages(self, question: str, **where: Any) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.run(
            "retrieval.search", self.collection, question, k=1000, where=where or None
        )["passages"]
        return found


@pytest.fixture(scope="module")
def broker(redis_binary: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with redis_for_results(tmp_path_factory.mktemp("redis")) as server:
        yield server.url


@pytest.fixture(scope="module")
def provider() -> Iterator[FakeOpenAI]:
    """Makes the vectors: so it is known what was embedded."""
    with FakeOpenAI() as server:
        yield server


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the log of the node is."""
    return tmp_path_factory.mktemp("nodes")


@pytest.fixture(scope="module")
def app(broker: str, provider: FakeOpenAI, directory: Path) -> Iterator[Celery]:
    settings = {
        "CLUSTER_EMBEDDING_BASE_URL": provider.base_url, "CLUSTER_EMBEDDING_MODEL": "fake-embedding",
        "CLUSTER_PROVIDER_MAX_RETRIES": "0", "CLUSTER_BREAKER_FAILURE_THRESHOLD": "1000",
    }  # fmt: skip
    with node(broker, "indexing", directory, **settings) as app:
        yield app


@pytest.fixture
def folder(app: Celery, broker: str, tmp_path: Path, request: pytest.FixtureRequest) -> Folder:
    path = tmp_path / "docs"
    path.mkdir()
    collection = request.node.name.removeprefix("test_")[:64]
    return Folder(path, collection, {"CLUSTER_BROKER_URL": broker, "CLUSTER_NAME": "indexing"}, sender(app))


def test_files_of_every_kind_are_found_again_by_what_they_say(folder: Folder) -> None:
    folder.write({**FILES, **UNREADABLE})
    report = folder.index()
    assert sorted(report["indexed"]) == sorted(FILES)
    assert report["skipped"] == {
        "empty.txt": "it holds no text", "latin.txt": "it is not text in UTF-8", "locked.pdf": "it is encrypted",
    }  # fmt: skip
    assert (report["files"], report["unchanged"], report["removed"], report["failed"]) == (8, 0, [], {})
    held = folder.held()
    assert held.keys() == {f"docs/{name}" for name in FILES}
    assert all(document["complete"] for document in held.values())
    assert sum(document["passages"] for document in held.values()) == report["passages"]
    own = held["docs/guide.md"]["metadata"]
    assert own.keys() == {"folder", "source", "digest"}
    assert (own["folder"], own["source"]) == ("docs", "guide.md")
    [step, *_] = folder.passages("Do the thing number 7", source="guide.md")
    assert step["metadata"]["heading"].startswith("Guide > Step ")
    assert len(step["text"]) <= 1000
    assert folder.passages("light", page=1)[0]["metadata"]["source"] == "paper.pdf"
    assert folder.passages("hammer", heading="hammer")[0]["text"] == FILES["tool.py"].decode().strip()


def test_a_second_run_embeds_and_changes_nothing(folder: Folder, provider: FakeOpenAI) -> None:
    folder.write(FILES)
    folder.index()
    before, asked = folder.held(), len(provider.requests)
    report = folder.index()
    assert (report["indexed"], report["unchanged"], report["removed"]) == ([], len(FILES), [])
    assert len(provider.requests) == asked
    assert folder.held() == before


def test_a_run_that_changed_something_lets_a_node_compact_the_collection(folder: Folder, directory: Path) -> None:
    def compacted() -> int:
        found = re.findall(r"Task retrieval\.optimize\[\S+\] succeeded", log_of(directory, "indexing").read_text())
        return len(found)

    before = compacted()
    folder.write(FILES)
    folder.index()
    wait_until(lambda: compacted() == before + 1, WITHIN_S)
    folder.index()
    (folder.path / "tool.py").unlink()
    assert folder.index()["removed"] == ["tool.py"]
    wait_until(lambda: compacted() > before + 1, WITHIN_S)
    # The second run has sent none.
    assert compacted() == before + 2


def test_a_changed_file_leaves_no_old_passage_and_one_that_is_gone_none_at_all(folder: Folder) -> None:
    folder.write(FILES)
    folder.index()
    folder.write({"guide.md": b"# Guide\n\nThere is nothing to do.", "notes/hen.txt": b""})
    (folder.path / "tool.py").unlink()
    report = folder.index()
    assert (report["indexed"], sorted(report["removed"])) == (["guide.md"], ["notes/hen.txt", "tool.py"])
    assert folder.held().keys() == {"docs/guide.md", "docs/notes/page.html", "docs/paper.pdf"}
    [guide] = folder.passages("guide", source="guide.md")
    assert guide["text"] == "# Guide\n\nThere is nothing to do."
    folder.write({"guide.md": GUIDE.encode()})
    assert folder.index("--size", "200", "--overlap", "0")["passages"] > 12
    assert all(len(passage["text"]) <= 200 for passage in folder.passages("guide"))


def test_what_a_run_does_not_look_at_stays_and_what_it_leaves_out_goes(folder: Folder, tmp_path: Path) -> None:
    folder.write(FILES)
    folder.index()
    own = {"id": "own", "text": "Not from a file.", "metadata": {"folder": "docs", "source": "own"}}
    folder.run("retrieval.add_documents", folder.collection, [own])
    assert folder.index("--include", "*.md")["removed"] == []
    assert sorted(folder.index("--exclude", "notes")["removed"]) == ["notes/hen.txt", "notes/page.html"]
    other = Folder(tmp_path / "other", folder.collection, folder.variables, folder.run)
    other.write({"guide.md": b"Another guide."})
    assert other.index()["removed"] == []
    assert {"docs/guide.md", "docs/paper.pdf", "other/guide.md", "own"} < folder.held().keys()


def test_a_name_that_could_be_a_file_of_another_folder_is_refused(folder: Folder) -> None:
    folder.write(FILES)
    _, complained = folder.end(folder.start("--name", "docs/notes"), 2)
    assert "--name docs/notes: with a slash it could be a file of another folder" in " ".join(complained.split())


def test_what_is_missing_of_a_document_is_added_again(folder: Folder) -> None:
    folder.write(FILES)
    folder.index()
    complete = folder.held()
    folder.run("retrieval.delete_documents", folder.collection, ids=["docs/guide.md#passage-2"])
    assert not folder.held()["docs/guide.md"]["complete"]
    assert folder.index()["indexed"] == ["guide.md"]
    assert folder.held() == complete


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_was_ended_is_completed_by_the_next(folder: Folder, number: signal.Signals) -> None:
    folder.collection = f"ended-by-{number.name.lower()}"
    folder.write({f"{n:03}.txt": f"Text number {n}. ".encode() * 100 for n in range(200)})
    command = folder.start("--batch", "2")
    assert command.stderr
    line = command.stderr.readline()
    assert line.endswith(" of 200 files\n"), line + command.stderr.read()
    command.send_signal(number)
    said, complained = folder.end(command, -number if number is signal.SIGKILL else 128 + number)
    if number is signal.SIGINT:
        assert "Stopped: interrupted. " in complained
        assert "files indexed" in said
    report = folder.index()
    assert report["unchanged"] >= 2
    assert len(report["indexed"]) + report["unchanged"] == 200
    # Jobs that were under way may have ended only now: they have changed nothing.
    held = wait_until(lambda: all_complete(folder.held()), WITHIN_S)
    assert sorted(held) == [f"docs/{n:03}.txt" for n in range(200)]
    ids = [passage["id"] for passage in folder.passages("text")]
    assert len(ids) == len(set(ids)) == sum(document["passages"] for document in held.values())


def all_complete(held: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]] | None:
    return held if all(document["complete"] for document in held.values()) else None


def test_a_file_that_cannot_be_embedded_is_named_and_the_others_are_indexed(
    folder: Folder, provider: FakeOpenAI
) -> None:
    folder.write(FILES)
    # The job of both fails, and then that of one by itself, whichever is run first.
    provider.fail(400, message="a text is too long", times=2)
    report = folder.index("--include", "hen.txt", "--include", "paper.pdf", exit_code=1)
    [(failed, reason)] = report["failed"].items()
    assert {failed, *report["indexed"]} == {"notes/hen.txt", "paper.pdf"}
    assert "a text is too long" in reason
    said, _ = folder.end(folder.start(), 0)
    assert "4 files indexed" in said
    assert "1 unchanged, 0 removed, 0 skipped, 0 failed" in said


def test_a_file_that_fits_into_no_job_is_skipped(folder: Folder) -> None:
    folder.write({"large.txt": b"long " * 10_000, "small.txt": b"short"})
    report = folder.index(CLUSTER_MAX_MESSAGE_BYTES="20000")
    assert report["indexed"] == ["small.txt"]
    assert "cluster_max_message_bytes" in report["skipped"]["large.txt"]
    assert folder.index()["indexed"] == ["large.txt"]


def test_a_provider_that_is_away_ends_the_run_which_says_so(folder: Folder, provider: FakeOpenAI) -> None:
    folder.write({f"{n}.txt": b"text %d" % n for n in range(30)})
    provider.fail(503, times=None)
    try:
        said, complained = folder.end(folder.start("--batch", "1"), 1)
    finally:
        provider.recover()
    assert "Stopped: " in complained
    assert "0 files indexed" in said
    assert folder.index()["failed"] == {}
    assert len(folder.held()) == 30


def test_a_broker_that_goes_away_ends_the_run_in_a_line(folder: Folder, tmp_path: Path) -> None:
    folder.write(FILES)
    with redis_for_results(tmp_path / "redis") as server:
        command = folder.start(CLUSTER_BROKER_URL=server.url)
        assert command.stderr
        assert command.stderr.readline() == "No node serves retrieval: this waits until one does.\n"
    _, complained = folder.end(command, 69)
    assert "the next run does the rest" in complained


def test_wrong_arguments_and_a_broker_that_is_away_are_told_in_a_line(folder: Folder) -> None:
    folder.write(FILES)
    wrong = [
        (("--size", "100", "--overlap", "51"), 2, "more than half the size"),
        (("--collection", "Big"), 1, "collection: String should match"),
        (("--app", "no_such_app"), 1, "no Celery app 'no_such_app'"),
    ]
    for words, exit_code, problem in wrong:
        _, complained = folder.end(folder.start(*words), exit_code)
        assert problem in complained
    url = f"redis://127.0.0.1:{free_port()}/0"
    _, complained = folder.end(folder.start(CLUSTER_BROKER_URL=url), 69)
    assert f"is Redis up at {url}?" in complained
