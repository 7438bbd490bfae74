"""What the ready-made jobs take, refuse and share, without a broker."""

from __future__ import annotations

import inspect
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import wraps
from importlib import import_module
from typing import Any

import pytest
from celery import Celery, Task, chain
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel

from cluster_tasks import Cluster, ClusterTask
from cluster_tasks.app import JOBS as MODULES
from cluster_tasks.errors import ClusterError, InvalidArguments
from cluster_tasks.providers import ChatRequest
from cluster_tasks.shards.layout import check_collection
from cluster_tasks.shards.query import MAX_K
from cluster_tasks.tasks import arguments, generate
from cluster_tasks.tasks.base import validate_arguments

JOBS = {
    "llm.generate": "llm",
    "embedding.embed": "embedding",
    "retrieval.add_documents": "retrieval",
    "retrieval.search": "retrieval",
    "retrieval.delete_documents": "retrieval",
    "retrieval.merge": "retrieval",
    "retrieval.optimize": "retrieval",
    "retrieval.get_documents": "retrieval",
    "retrieval.list_documents": "retrieval",
    "retrieval.search_shards": "retrieval",
    "rag.answer": "retrieval",
    "rag.search": "retrieval",
    "rag.generate": "llm",
}
HEAVY = ("numpy", "openai", "lancedb", "pyarrow", "semantic_text_splitter", "markdown_it", "pypdf", "selectolax")

# An app knows the jobs of the modules that its process has imported.
for module in MODULES:
    import_module(f"cluster_tasks.tasks.{module}")


@pytest.fixture
def app() -> Iterator[Celery]:
    # A port where nobody listens: whatever reached out would fail.
    with Celery("user", set_as_current=False, broker="redis://127.0.0.1:1/0", backend="cache+memory://") as app:
        Cluster(app)
        yield app


@pytest.fixture
def eager(app: Celery) -> Celery:
    app.conf.update(task_always_eager=True, task_eager_propagates=True)
    return app


def run(script: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()


def test_every_app_knows_the_jobs_and_their_request_types(app: Celery) -> None:
    # Apps of this module may share tasks of their own.
    declared = {
        name: task.request_type
        for name, task in app.tasks.items()
        if isinstance(task, ClusterTask) and not name.startswith(__name__)
    }
    assert declared == JOBS


# Refusal in the caller.


@pytest.mark.parametrize(
    ("job", "kwargs", "problem"),
    [
        ("llm.generate", {"prompt": "a", "temperature": 2.5}, "temperature: Input should be less than or equal to 2"),
        ("llm.generate", {"prompt": "a", "temperature": float("nan")}, "temperature: Input should be"),
        ("llm.generate", {"prompt": "a", "max_tokens": 0}, "max_tokens: Input should be greater"),
        ("llm.generate", {"prompt": ""}, "prompt: String should have at least 1 character"),
        ("llm.generate", {}, "expected either prompt or messages"),
        ("llm.generate", {"prompt": "a", "messages": [{"role": "user"}]}, "expected either prompt or messages"),
        ("llm.generate", {"messages": []}, "messages: List should have at least 1 item"),
        ("llm.generate", {"messages": [{"content": "a"}]}, "messages.0: a message needs a role"),
        ("llm.generate", {"messages": [{"role": "user"}], "passages": ["a"]}, "passages go with a prompt"),
        ("llm.generate", {"prompt": "a", "stream": True}, "extra: stream cannot be passed on"),
        ("embedding.embed", {"texts": []}, "texts: List should have at least 1 item"),
        ("embedding.embed", {"texts": ["a", ""]}, "texts.1: String should have at least 1 character"),
        ("embedding.embed", {"texts": ["a", 5]}, "texts.1: Input should be a valid string"),
        ("retrieval.add_documents", {"collection": "Big", "documents": []}, "collection: String should match"),
        ("retrieval.add_documents", {"collection": "a", "documents": ["x", {}]}, "documents.1.text: Field required"),
        ("retrieval.add_documents", {"collection": "a", "documents": [{"text": "x", "metadata": {"n": None}}]}, "n"),
        ("retrieval.add_documents", {"collection": "a", "documents": [], "split": {"size": 3}}, "split.size: Input"),
        ("retrieval.add_documents", {"collection": "a", "documents": [], "split": {"unit": "words"}}, "split.unit: "),
        (
            "retrieval.add_documents",
            {"collection": "a", "documents": [], "split": {"size": 100, "overlap": 60}},
            "split: an overlap of 60 is more than half the size of 100",
        ),
        (
            "retrieval.add_documents",
            {"collection": "a", "documents": [{"text": "x", "metadata": {"page": 1}}], "split": {}},
            "documents.0: split passages have a metadata 'page' of their own",
        ),
        (
            "retrieval.add_documents",
            {"collection": "a", "documents": [{"text": "x", "id": "a" * 501}], "split": {}},
            "documents.0: with split, an id has at most 490 characters",
        ),
        ("retrieval.list_documents", {"collection": "a", "limit": 0}, "limit: Input should be greater"),
        ("retrieval.search", {"collection": "a"}, "expected either query or vector"),
        ("retrieval.search", {"collection": "a", "query": "b", "vector": [1.0]}, "expected either query or vector"),
        ("retrieval.search", {"collection": "a", "vector": [float("inf")]}, "vector.0: Input should be a finite"),
        ("retrieval.search", {"collection": "a", "query": "b", "k": 0}, "k: Input should be greater"),
        ("retrieval.search", {"collection": "a", "query": "b", "where": {"n": {"lik": 1}}}, "where: 'n': unknown"),
        (
            "retrieval.search",
            {"collection": "a", "query": "b", "mode": "words"},
            "mode: Input should be 'vector'",
        ),
        ("retrieval.search", {"collection": "a", "vector": [1.0], "mode": "hybrid"}, "mode 'hybrid' needs a query"),
        ("rag.answer", {"question": "a", "collection": "b", "mode": "words"}, "mode: Input should be 'vector'"),
        ("retrieval.search", {"collection": "a", "vector": [1.0], "rerank": True}, "rerank needs a query"),
        ("retrieval.search", {"collection": "a", "query": "b", "rerank": 1}, "rerank"),
        ("retrieval.search", {"collection": "a", "query": "b", "candidates": 9}, "expected rerank, too"),
        ("retrieval.search", {"collection": "a", "query": "b", "k": 1001, "rerank": "local"}, "k is 1000 at most"),
        ("rag.answer", {"question": "a", "collection": "b", "rerank": "", "k": 3}, "rerank"),
        (
            "rag.answer",
            {"question": "a", "collection": "b", "rerank": True, "k": 9, "candidates": 8},
            "8 candidates are fewer than k=9",
        ),
        ("retrieval.delete_documents", {"collection": "a"}, "expected ids or where"),
        ("retrieval.delete_documents", {"collection": "a", "where": {}}, "expected ids or where"),
        ("rag.answer", {"question": "a"}, "missing a required argument: 'collection'"),
        ("rag.answer", {"question": "a", "collection": "b", "messages": []}, "extra: messages cannot be passed on"),
    ],
)
def test_the_caller_is_told_which_field_is_wrong(app: Celery, job: str, kwargs: dict[str, Any], problem: str) -> None:
    with pytest.raises(InvalidArguments) as refused:
        app.tasks[job].delay(**kwargs)
    assert str(refused.value).startswith(f"{job}: ")
    assert problem in str(refused.value)


def test_all_problems_are_named_at_once(app: Celery) -> None:
    with pytest.raises(InvalidArguments, match=r"llm\.generate: temperature: .*; max_tokens: "):
        app.tasks["llm.generate"].delay("a", temperature=-1, max_tokens=-1)


def test_a_refusal_does_not_repeat_the_prompt(app: Celery) -> None:
    with pytest.raises(InvalidArguments) as refused:
        app.tasks["llm.generate"].delay(messages=["a private prompt"])
    assert "private" not in str(refused.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
MESSAGES = st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": JSON}), min_size=1, max_size=2)


@given(
    messages=MESSAGES,
    options=st.fixed_dictionaries(
        {},
        optional={
            "model": st.text(max_size=3) | JSON,
            "temperature": st.floats(-1, 3) | JSON,
            "max_tokens": st.integers(-2, 2) | JSON,
            "stop": st.lists(st.text()) | JSON,
            "tools": st.lists(st.dictionaries(st.text(), JSON)) | JSON,
            "response_format": JSON,
            "extra": st.dictionaries(st.sampled_from([*ChatRequest.model_fields, "stream", "top_p"]), JSON),
        },
    ),
)
def test_what_the_caller_lets_pass_is_a_request_that_providers_take(
    messages: list[dict[str, Any]], options: dict[str, Any]
) -> None:
    # The signature of the job binds these before they could be further parameters.
    bound = {"messages", "model", "temperature", "max_tokens", "stop", "tools", "response_format", "passages"}
    options["extra"] = {key: value for key, value in options.get("extra", {}).items() if key not in bound}
    given = {"messages": messages, **options}
    try:
        passed = validate_arguments("llm.generate", arguments.GenerateArguments, given)
    except InvalidArguments:
        return
    ChatRequest(**{name: getattr(passed, name) for name in ("messages", *options)})


@given(st.from_regex(r"[a-zA-Z0-9_.\-\n]{0,66}", fullmatch=True) | st.text(max_size=3))
@example("a" * 64)
@example("a" * 65)
@example("a\n")
def test_callers_and_store_agree_on_the_names_of_collections(name: str) -> None:
    def accepts(check: Any) -> bool:
        try:
            check()
        except InvalidArguments:
            return False
        return True

    given = {"collection": name, "documents": []}
    assert accepts(lambda: validate_arguments("job", arguments.AddArguments, given)) == accepts(
        lambda: check_collection(name)
    )
    assert arguments.MAX_K == MAX_K


# What the job gets.


class Numbers(BaseModel):
    numbers: list[int]
    extra: dict[str, int] = {}


def test_a_task_gets_the_values_that_its_model_has_parsed(eager: Celery) -> None:
    @eager.task(base=ClusterTask, arguments=Numbers, bind=True)
    def add(self: ClusterTask, numbers: list[int], **extra: int) -> int:
        return sum(numbers) + sum(extra.values())

    assert add.delay(("1", 2), more="3").get() == 6
    assert add(["4"]) == 4
    with pytest.raises(InvalidArguments, match=r"numbers\.0"):
        add(["x"])


def test_a_decorator_may_hand_on_what_it_is_given_or_add_to_it(eager: Celery) -> None:
    def logged(function: Any) -> Any:
        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        return run

    def in_session(function: Any) -> Any:
        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            return function("session", *args, **kwargs)

        return run

    @eager.task(base=ClusterTask, affinity="user", shared=False)
    @logged
    def greet(user: str, word: str = "hello") -> str:
        return f"{word} {user}"

    @eager.task(base=ClusterTask, affinity="user", shared=False)
    @in_session
    def store(session: str, user: str, *, key: str) -> str:
        return f"{session} {user} {key}"

    assert greet.delay("ann").get() == "hello ann"
    assert greet.affinity_of(["ann"], {}) == "ann"
    assert store.delay("ann", key="k").get() == "session ann k"
    assert store.affinity_of([], {"user": "ann", "key": "k"}) == "ann"


def test_what_neither_a_decorator_nor_its_function_takes_is_refused(app: Celery) -> None:
    def in_session(function: Any) -> Any:
        @wraps(function)
        def run(user: str) -> Any:
            return function("session", user)

        return run

    @app.task(base=ClusterTask, shared=False)
    @in_session
    def forget(session: str, user: str) -> None:
        """Nothing: no node runs it."""

    assert forget.check_arguments(["ann"], {}).arguments == {"user": "ann"}
    with pytest.raises(InvalidArguments, match="missing a required argument: 'session'"):
        forget.delay()


class Prepared(Task):  # type: ignore[misc]
    """A base of the user's, which is not the first."""

    bound_to: Any = None

    def __init__(self) -> None:
        self.prepared = True

    @classmethod
    def on_bound(cls, app: Any) -> None:
        cls.bound_to = app


class Mine(ClusterTask, Prepared):
    abstract = True


def test_a_base_of_ones_own_is_made_and_bound_as_well(app: Celery) -> None:
    @app.task(base=Mine, shared=False)
    def work() -> None:
        """Nothing: no node runs it."""

    assert work.prepared
    assert work.bound_to is app
    assert work.acks_late


def test_a_wrong_result_in_a_chain_fails_the_job_that_gets_it(app: Celery) -> None:
    app.conf.task_always_eager = True
    embed, generate = app.tasks["embedding.embed"], app.tasks["llm.generate"]
    result = chain(embed.s("a"), generate.s()).apply_async()
    assert isinstance(result.result, InvalidArguments)
    assert result.parent.successful()


# Affinity.


@pytest.mark.parametrize(
    ("job", "args", "kwargs", "affinity"),
    [
        ("llm.generate", ("a" * 300,), {}, "a" * 256),
        ("llm.generate", ("a",), {"session_id": "s"}, "s"),
        ("llm.generate", (), {"messages": [{"role": "system", "content": "a" * 300}, {"role": "user"}]}, "a" * 256),
        ("llm.generate", (), {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}, "ab"),
        ("llm.generate", (), {"messages": ["junk"]}, ""),
        ("embedding.embed", ("a",), {}, "a"),
        ("embedding.embed", (["a", "b"],), {}, "a"),
        ("embedding.embed", ([],), {}, ""),
        ("retrieval.add_documents", ("docs", ["a"]), {}, "docs"),
        ("retrieval.search", (), {"collection": "docs", "query": "a"}, "docs"),
        ("retrieval.delete_documents", ("docs",), {"ids": []}, "docs"),
        ("rag.answer", ("why?", "docs"), {}, "docs"),
        ("rag.search", ({}, "docs", 5, None), {}, "docs"),
        ("rag.generate", ({}, "why?"), {"model": None, "session_id": None}, "why?"),
        ("rag.generate", ({}, "why?"), {"model": None, "session_id": "s"}, "s"),
    ],
)
def test_jobs_share_a_node_by_session_prefix_text_or_collection(
    app: Celery, job: str, args: tuple[Any, ...], kwargs: dict[str, Any], affinity: str
) -> None:
    assert app.tasks[job].affinity_of(args, kwargs) == affinity


# Which app sends.


def test_jobs_belong_to_the_current_app_if_it_is_in_a_cluster(app: Celery) -> None:
    before = Celery("outside", set_as_current=False)
    before.set_current()
    assert generate.app.main == "cluster_tasks"
    app.set_current()
    assert generate.app is app
    before.set_current()


def test_in_another_thread_the_users_app_sends_and_not_the_ready_made_one() -> None:
    script = """
import threading
from celery import Celery
from cluster_tasks import Cluster
from cluster_tasks.tasks import generate
app = Celery("user")
Cluster(app)
found = []
thread = threading.Thread(target=lambda: found.append(generate.app))
thread.start(), thread.join()
print(found[0].main)
"""
    assert run(script) == "user"


def test_without_an_app_of_ones_own_the_ready_made_one_sends() -> None:
    assert run("from cluster_tasks.tasks import generate; print(generate.app.main)") == "cluster_tasks"


def test_an_app_is_in_one_cluster_only() -> None:
    with Celery("shop", set_as_current=False) as app:
        Cluster(app)
        with pytest.raises(ClusterError, match="the app 'shop' is in a cluster already"):
            Cluster(app)


def test_the_settings_of_a_task_are_those_of_its_cluster(app: Celery) -> None:
    app.conf.cluster_data_dir = "elsewhere"
    assert app.tasks["llm.generate"].settings.data_dir == "elsewhere"
    with Celery("outside", set_as_current=False) as outside, pytest.raises(ClusterError, match="in no cluster"):
        _ = outside.tasks["llm.generate"].settings


def test_who_only_sends_jobs_loads_nothing_heavy() -> None:
    script = f"""
import sys
import cluster_tasks
from cluster_tasks.tasks import add_documents, answer, delete_documents, embed, generate, search
from cluster_tasks.tasks import get_documents, list_documents
for job in add_documents, answer, delete_documents, embed, generate, get_documents, list_documents, search:
    try:
        job.delay(temperature=3)  # All that a caller does before the broker is asked.
    except cluster_tasks.ClusterError:
        pass
print([name for name in {HEAVY} if name in sys.modules])
"""
    assert run(script) == "[]"


def test_collections_without_lancedb_name_what_to_install(eager: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lancedb", None)
    with pytest.raises(ClusterError, match=r"cluster-tasks\[retrieval\]"):
        eager.tasks["retrieval.search"].delay("docs", "why?")


def test_a_node_without_lancedb_has_no_collection_to_compact(eager: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lancedb", None)
    assert eager.tasks["retrieval.optimize"].delay().get() == {"collections": []}


def test_threads_share_what_jobs_of_an_app_work_with(eager: Celery) -> None:
    from cluster_tasks.tasks.ready_made import backends_of

    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(backends_of(eager))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(backends is backends_of(eager) for backends in found)
    assert backends_of(eager).embeddings is backends_of(eager).embeddings


def bound_to_nothing() -> None: ...


def bound_to_two(a: int, b: int) -> None: ...


def bound_with_defaults(a: int, b: int = 2, c: int = 3) -> None: ...


def bound_with_rest(a: int, *rest: int, b: int = 2, **others: int) -> None: ...


@pytest.mark.parametrize("run", [bound_to_nothing, bound_to_two, bound_with_defaults, bound_with_rest])
@given(args=st.lists(st.integers(), max_size=4), kwargs=st.dictionaries(st.sampled_from("abcd"), st.integers()))
def test_arguments_are_bound_as_python_binds_them(run: Any, args: list[int], kwargs: dict[str, int]) -> None:
    app = Celery("user", set_as_current=False)
    task = app.task(base=ClusterTask, shared=False, name="bound", request_type="llm")(run)
    try:
        as_ever = inspect.signature(run).bind(*args, **kwargs)
    except TypeError:
        with pytest.raises(InvalidArguments):
            task.check_arguments(args, kwargs)
    else:
        assert task.check_arguments(args, kwargs) == as_ever
