"""LangChain's standard suites, and what they do not ask, on a real node with an OpenAI-compatible server."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest
from celery import Celery
from celery.exceptions import TimeoutError as CeleryTimeout
from langchain_core.caches import BaseCache
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.indexing import InMemoryRecordManager, aindex, index
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.outputs import Generation
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import ConfigurableField
from langchain_tests.integration_tests import (
    AsyncCacheTestSuite,
    ChatModelIntegrationTests,
    EmbeddingsIntegrationTests,
    RetrieversIntegrationTests,
    SyncCacheTestSuite,
    VectorStoreIntegrationTests,
)
from langchain_tests.unit_tests import ChatModelUnitTests, EmbeddingsUnitTests
from pydantic import ValidationError

from cluster_tasks.cluster import cluster_of
from cluster_tasks.errors import (
    CollectionNotFound,
    ConfigurationError,
    InvalidArguments,
    ProviderError,
    StreamRestarted,
)
from cluster_tasks.langchain import ChatCluster, ClusterCache, ClusterEmbeddings, ClusterRetriever, ClusterVectorStore
from cluster_tasks.langchain import embeddings as batches
from cluster_tasks.tasks.kept import digest
from cluster_tasks.testing import CHAT_PATH, EMBEDDINGS_PATH, FakeOpenAI
from tests.chat_model import call_tools
from tests.integration.ready_made import WITHIN_S, node
from tests.servers import redis_for_results
from tests.waiting import wait_until

pytestmark = [
    # Celery's own way to store a result that expires.
    pytest.mark.filterwarnings("ignore:Call to deprecated setex"),
    # The suites have methods of both kinds, and call what is in beta.
    pytest.mark.asyncio,
    pytest.mark.filterwarnings("ignore:.*but it is not an async function"),
    pytest.mark.filterwarnings("ignore:.* in beta"),
]
MODEL, OTHER = "fake-chat", "other-chat"
SAID = "one two three four five six seven eight"
TEXTS = ["Backups run at two in the morning.", "Logs are kept for a week.", "The office closes at six."]


@pytest.fixture(scope="module")
def provider() -> Iterator[FakeOpenAI]:
    with FakeOpenAI(answer=call_tools) as server:
        yield server


@pytest.fixture(scope="module")
def second() -> Iterator[FakeOpenAI]:
    """Who answers when the provider is not to be had."""
    with FakeOpenAI() as server:
        yield server


@pytest.fixture(scope="module")
def app(
    redis_binary: str, provider: FakeOpenAI, second: FakeOpenAI, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Celery]:
    """Of one worker, with everything LangChain may ask for."""
    fallbacks = json.dumps([{"base_url": second.base_url, "model": OTHER}])
    directory = tmp_path_factory.mktemp("langchain")
    with (
        redis_for_results(directory) as server,
        node(
            server.url, "langchain", directory, CLUSTER_LLM_BASE_URL=provider.base_url, CLUSTER_LLM_MODEL=MODEL,
            CLUSTER_EMBEDDING_BASE_URL=provider.base_url, CLUSTER_EMBEDDING_MODEL="fake-embedding",
            CLUSTER_LLM_FALLBACKS=fallbacks, CLUSTER_CACHE_URL=server.url, CLUSTER_PROVIDER_MAX_RETRIES="0",
            CLUSTER_CACHE_TIMEOUT_S="5",
        ) as made,
    ):  # fmt: skip
        yield made
        cluster_of(made).caches.close()


@pytest.fixture(autouse=True)
def _provider_recovers(provider: FakeOpenAI) -> Iterator[None]:
    yield
    provider.recover()
    provider.pace_s = 0.0


@pytest.fixture
def collection() -> str:
    return f"c{uuid4().hex}"


@pytest.fixture
def store(app: Celery, collection: str) -> ClusterVectorStore:
    return ClusterVectorStore(collection, timeout_s=WITHIN_S, app=app)


@pytest.fixture
def filled(store: ClusterVectorStore) -> ClusterVectorStore:
    store.add_texts(TEXTS, [{"number": number} for number in range(len(TEXTS))], ids=["a", "b", "c"])
    return store


@pytest.fixture
def chat(app: Celery) -> ChatCluster:
    return ChatCluster(timeout=WITHIN_S, app=app)


# The standard suites.


class OfChatModels:
    """What both suites of chat models are told."""

    app: Celery

    @pytest.fixture(autouse=True)
    def _app(self, app: Celery) -> None:
        self.app = app

    @property
    def chat_model_class(self) -> type[ChatCluster]:
        return ChatCluster

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": MODEL, "app": self.app}

    @property
    def standard_chat_model_params(self) -> dict[str, Any]:
        # Keys and repeats are the nodes' settings, and refused here.
        return {"temperature": 0, "max_tokens": 100, "timeout": WITHIN_S, "stop": []}


class TestChatModelUnit(OfChatModels, ChatModelUnitTests):
    pass


class TestChatModel(OfChatModels, ChatModelIntegrationTests):
    @property
    def supports_model_override(self) -> bool:
        return True

    @property
    def model_override_value(self) -> str:
        return OTHER


class OfEmbeddings:
    """What both suites of embeddings are told."""

    app: Celery

    @pytest.fixture(autouse=True)
    def _app(self, app: Celery) -> None:
        self.app = app

    @property
    def embeddings_class(self) -> type[ClusterEmbeddings]:
        return ClusterEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {"timeout_s": WITHIN_S, "app": self.app}


class TestEmbeddingsUnit(OfEmbeddings, EmbeddingsUnitTests):
    pass


class TestEmbeddings(OfEmbeddings, EmbeddingsIntegrationTests):
    pass


class TestVectorStore(VectorStoreIntegrationTests):
    @pytest.fixture
    def vectorstore(self, store: ClusterVectorStore) -> ClusterVectorStore:
        return store


class TestRetriever(RetrieversIntegrationTests):
    given: dict[str, Any]

    @pytest.fixture(autouse=True)
    def _filled(self, filled: ClusterVectorStore, app: Celery) -> None:
        self.given = {"collection": filled.collection, "timeout_s": WITHIN_S, "app": app}

    @property
    def retriever_constructor(self) -> type[BaseRetriever]:
        return ClusterRetriever

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return self.given

    @property
    def retriever_query_example(self) -> str:
        return "backups"


class TestCache(SyncCacheTestSuite):
    @pytest.fixture
    def cache(self, app: Celery) -> BaseCache:
        return ClusterCache(namespace=f"n{uuid4().hex}", app=app)


class TestCacheAsync(AsyncCacheTestSuite):
    @pytest.fixture
    def cache(self, app: Celery) -> BaseCache:  # type: ignore[override]  # a fixture need not be awaited
        return ClusterCache(namespace=f"n{uuid4().hex}", app=app)


# The extra.


def test_without_langchain_the_error_names_the_extra_and_the_rest_works() -> None:
    script = """
import sys
sys.modules["langchain_core"] = None
import cluster_tasks, cluster_tasks.app, cluster_tasks.cli.main, cluster_tasks.tasks.rag
try:
    import cluster_tasks.langchain
except cluster_tasks.ClusterError as exc:
    print(exc)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "cluster_tasks.langchain needs LangChain: pip install 'cluster-tasks[langchain]'\n"


def test_who_imports_it_serves_no_more_types_than_before() -> None:
    script = """
import cluster_tasks.langchain
from celery import Celery
print(sorted(name for name in Celery("mine").tasks if not name.startswith("celery.")))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# Embeddings.


@pytest.mark.parametrize("asked", ["threads", "asyncio"])
def test_many_texts_are_embedded_in_batches_and_come_in_their_order(
    app: Celery, provider: FakeOpenAI, asked: str
) -> None:
    texts = [f"{asked} {number}" for number in range(3 * batches.BATCH + 1)]
    embeddings = ClusterEmbeddings(timeout_s=WITHIN_S, app=app, cache=False)
    before = provider.counts[EMBEDDINGS_PATH]
    vectors = (
        embeddings.embed_documents(texts) if asked == "threads" else asyncio.run(embeddings.aembed_documents(texts))
    )
    assert provider.counts[EMBEDDINGS_PATH] - before == 4
    assert len(vectors) == len(texts)
    assert vectors[150] == pytest.approx(embeddings.embed_query(texts[150]))
    assert embeddings.embed_documents([]) == []
    with pytest.raises(InvalidArguments, match=r"texts\.0: String should have at least 1 character"):
        embeddings.embed_query("")
    with pytest.raises(ValueError, match="batch_size=0: expected at least 1"):
        ClusterEmbeddings(batch_size=0)


# The vector store.


def test_scores_are_similarities_and_a_threshold_leaves_out_what_is_unlike(filled: ClusterVectorStore) -> None:
    (best, score), *others = filled.similarity_search_with_score(TEXTS[1], k=3)
    assert (best.id, best.metadata, score) == ("b", {"number": 1}, pytest.approx(1.0))
    assert [other for _, other in others] == sorted((other for _, other in others), reverse=True)
    retriever = filled.as_retriever(search_type="similarity_score_threshold", search_kwargs={"score_threshold": 0.99})
    assert retriever.invoke(TEXTS[1]) == [best]


def test_a_filter_a_mode_and_a_vector_choose_what_is_found(filled: ClusterVectorStore) -> None:
    unlike = filled.similarity_search(TEXTS[1], k=3, filter={"number": {"ne": 1}})
    assert {found.id for found in unlike} == {"a", "c"}
    assert [found.id for found in filled.similarity_search("logs", k=3, mode="text")] == ["b"]
    vector = filled.embeddings.embed_query(TEXTS[2])
    assert [found.id for found in filled.similarity_search_by_vector(vector, k=1)] == ["c"]
    assert [found.id for found in asyncio.run(filled.asimilarity_search_by_vector(vector, k=1))] == ["c"]
    with pytest.raises(InvalidArguments, match="where: 'number': unknown operator 'gle'"):
        filled.similarity_search("x", filter={"number": {"gle": 1}})
    with pytest.raises(InvalidArguments, match="unexpected keyword argument 'filtre'"):
        filled.similarity_search("x", filtre={})


def test_marginal_relevance_prefers_variety(filled: ClusterVectorStore) -> None:
    filled.add_texts([f"{TEXTS[0]} ", f"{TEXTS[0]}!"], ids=["a2", "a3"])
    alike = {found.id for found in filled.similarity_search(TEXTS[0], k=3)}
    varied = filled.max_marginal_relevance_search(TEXTS[0], k=3, lambda_mult=0.1)
    assert alike == {"a", "a2", "a3"}
    assert {found.id for found in varied} >= {"b", "c"}
    assert asyncio.run(filled.amax_marginal_relevance_search(TEXTS[0], k=3, lambda_mult=0.1)) == varied


def test_texts_are_added_by_the_hundred_and_the_last_of_an_id_stays(store: ClusterVectorStore) -> None:
    texts = [f"text {number}" for number in range(250)]
    ids = store.add_texts([*texts, "the last"], ids=[f"id{number}" for number in range(250)] + ["id0"])
    assert ids == [*(f"id{number}" for number in range(250)), "id0"]
    assert [found.page_content for found in store.get_by_ids(["id0", "id249", "nobody"])] == ["the last", "text 249"]
    assert store.add_texts(["equal", "equal"]) == [store.add_texts(["equal"])[0]] * 2


@pytest.mark.parametrize("asked", ["threads", "asyncio"])
def test_documents_are_kept_up_to_date_by_the_index_of_langchain(store: ClusterVectorStore, asked: str) -> None:
    records = InMemoryRecordManager(store.collection)

    def keep(*texts: str) -> dict[str, int]:
        documents = [Document(text) for text in texts]
        options: Any = {"batch_size": 2, "cleanup": "full", "key_encoder": "sha256"}
        if asked == "threads":
            done: Any = index(documents, records, store, **options)
        else:
            done = asyncio.run(aindex(documents, records, store, **options))
        return dict(done)

    assert keep(*TEXTS) == {"num_added": 3, "num_updated": 0, "num_skipped": 0, "num_deleted": 0}
    assert keep(*TEXTS[1:]) == {"num_added": 0, "num_updated": 0, "num_skipped": 2, "num_deleted": 1}
    assert {found.page_content for found in store.similarity_search("x", k=3)} == set(TEXTS[1:])
    with pytest.raises(ValueError, match="batch_size=0: expected at least 1"):
        store.add_texts(["a"], batch_size=0)


def test_what_cannot_be_stored_is_named_before_anything_is_sent(store: ClusterVectorStore) -> None:
    with pytest.raises(InvalidArguments, match=r"documents\.1\.metadata\.when: .*not dict"):
        store.add_texts(["a", "b"], [{}, {"when": {}}])
    with pytest.raises(ValueError, match="ids: expected one for each of 2 texts, got 1"):
        store.add_texts(["a", "b"], ids=["1"])
    with pytest.raises(InvalidArguments, match="spilt: Extra inputs are not permitted"):
        store.add_texts(["a"], spilt={})
    with pytest.raises(InvalidArguments, match="expected ids or where"):
        store.delete()
    assert store.similarity_search("a") == []


def test_a_store_is_made_of_texts_with_the_embeddings_of_the_cluster(app: Celery, collection: str) -> None:
    ours = ClusterEmbeddings(timeout_s=WITHIN_S, app=app)
    store = ClusterVectorStore.from_documents(
        [Document("# One\n\nA text.\n\n# Two\n\nAnother one.", id="d", metadata={"of": "x"})], ours,
        collection=collection, split={"size": 20, "overlap": 0, "format": "markdown"},
    )  # fmt: skip
    assert [found.metadata["heading"] for found in store.similarity_search("# Two\n\nAnother one.", k=1)] == ["Two"]
    assert store.delete(filter={"of": "x"})
    assert store.similarity_search("text") == []
    for theirs in (DeterministicFakeEmbedding(size=3), ClusterEmbeddings("other", app=app)):
        with pytest.raises(ConfigurationError, match=r"expected ClusterEmbeddings\(\) without a model"):
            ClusterVectorStore.from_texts(["a"], theirs, collection=collection)


# The retriever.


def test_a_retriever_finds_by_words_and_meaning_filters_and_ranks_anew(filled: ClusterVectorStore, app: Celery) -> None:
    retriever = ClusterRetriever(collection=filled.collection, k=1, rerank="local", timeout_s=WITHIN_S, app=app)
    assert [found.id for found in retriever.invoke("when do backups run?")] == ["a"]
    assert [found.id for found in retriever.invoke("when do backups run?", filter={"number": 2})] == ["c"]
    assert [found.id for found in asyncio.run(retriever.ainvoke("when are logs kept?"))] == ["b"]
    with pytest.raises(CollectionNotFound, match="did you mean"):
        ClusterRetriever(collection=filled.collection[:-1], timeout_s=WITHIN_S, app=app).invoke("x")
    with pytest.raises(ValidationError, match="where"):
        ClusterRetriever(collection="a", where={})  # type: ignore[call-arg]


# The chat model.


def test_an_answer_is_streamed_while_it_is_made_and_says_how(chat: ChatCluster, provider: FakeOpenAI) -> None:
    provider.hang(events=4)
    pieces = chat.stream(SAID)
    first = next(pieces)
    assert isinstance(first, AIMessageChunk)
    assert SAID.startswith(first.text)
    provider.release()
    whole = first
    for piece in pieces:
        whole += piece
    assert whole.text == SAID
    assert whole.usage_metadata == {"input_tokens": 8, "output_tokens": 8, "total_tokens": 16}
    expected = {"model_name": MODEL, "finish_reason": "stop", "provider": "openai", "degraded": False}
    assert expected.items() <= whole.response_metadata.items()


def test_a_model_that_is_configured_for_a_call_streams_as_before(chat: ChatCluster) -> None:
    model = chat.configurable_fields(temperature=ConfigurableField(id="temperature"))
    assert len(list(model.stream(SAID, config={"configurable": {"temperature": 0.5}}))) > 1
    assert len(list(ChatCluster(timeout=WITHIN_S, app=chat.app, streaming=False).stream(SAID))) == 1


@pytest.mark.parametrize("asked", ["threads", "asyncio"])
def test_who_stops_reading_ends_the_request_to_the_provider(
    chat: ChatCluster, provider: FakeOpenAI, asked: str
) -> None:
    provider.pace_s, left = 0.2, provider.left
    long = " ".join(["word"] * 300)

    async def read_one() -> None:
        pieces: Any = chat.astream(long)
        await anext(pieces)
        await pieces.aclose()

    if asked == "threads":
        pieces: Any = chat.stream(long)
        next(pieces)
        pieces.close()
    else:
        asyncio.run(read_one())
    wait_until(lambda: provider.left > left, WITHIN_S, "the node closes its connection")


@pytest.mark.parametrize("asked", ["threads", "asyncio"])
def test_an_answer_that_is_begun_again_ends_its_stream_with_an_error(
    chat: ChatCluster, provider: FakeOpenAI, asked: str
) -> None:
    provider.hang(events=4, status=500)

    def read() -> None:
        for piece in chat.stream(SAID):
            assert piece.text
            provider.release()

    async def read_async() -> None:
        async for piece in chat.astream(SAID):
            assert piece.text
            provider.release()

    with pytest.raises(StreamRestarted, match="asked again"):
        read() if asked == "threads" else asyncio.run(read_async())


def test_a_caller_that_waits_no_longer_has_its_job_revoked(chat: ChatCluster, provider: FakeOpenAI) -> None:
    provider.hang(times=2)
    before = provider.counts[CHAT_PATH]
    # Both slots of the node.
    others = [threading.Thread(target=chat.invoke, args=(f"other {number}",)) for number in range(2)]
    for other in others:
        other.start()
    wait_until(lambda: provider.counts[CHAT_PATH] == before + 2, WITHIN_S)
    with pytest.raises(CeleryTimeout):
        chat.model_copy(update={"timeout_s": 0.3}).invoke("nobody waits for this")

    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(chat.ainvoke("nor for this"), 0.3)

    asyncio.run(give_up())
    provider.release()
    for other in others:
        other.join()
    assert chat.invoke("but for this").text == "but for this"
    told = [request.body["messages"][-1]["content"] for request in provider.requests if request.path == CHAT_PATH]
    assert not {"nobody waits for this", "nor for this"} & set(told)


def test_parameters_of_the_model_and_of_the_call_reach_the_provider(chat: ChatCluster, provider: FakeOpenAI) -> None:
    model = chat.model_copy(update={"temperature": 0.5, "max_tokens": 9, "stop": ["END"]})
    model.invoke("x", temperature=0.7, stop=["STOP"], response_format={"type": "json_object"}, seed=7, cache=False)
    sent = provider.requests[-1].body
    expected = {"temperature": 0.7, "max_tokens": 9, "stop": ["STOP"], "seed": 7, "model": MODEL,
                "response_format": {"type": "json_object"}}  # fmt: skip
    assert expected.items() <= sent.items()
    image = {"type": "image", "base64": "QUJD", "mime_type": "image/png"}
    thought: Any = [{"type": "reasoning", "reasoning": "hm"}, {"type": "text", "text": "said"}]
    model.invoke(
        [HumanMessage([image, {"type": "text", "text": "what is it?"}]), AIMessage(thought), HumanMessage("x")]
    )
    user, answered, _ = provider.requests[-1].body["messages"]
    assert user["content"][0] == {"type": "image_url", "image_url": {"url": "data:image/png;base64,QUJD"}}
    assert answered == {"role": "assistant", "content": "said"}


def test_answers_of_other_models_and_replies_to_invalid_calls_are_said_as_providers_know_them(
    chat: ChatCluster, provider: FakeOpenAI
) -> None:
    theirs: Any = [
        {"type": "thinking", "thinking": "hm", "signature": "x"},
        {"type": "text", "text": "said"},
        {"type": "function_call", "call_id": "1", "name": "add", "arguments": "{}"},
    ]
    invalid: Any = {"type": "invalid_tool_call", "name": "add", "args": '{"a": ', "error": "no JSON"}
    calling = AIMessage(
        theirs, tool_calls=[{"id": "1", "name": "add", "args": {}}],
        invalid_tool_calls=[{**invalid, "id": "2"}, {**invalid, "id": "nobody replied"}],
    )  # fmt: skip
    chat.invoke([calling, ToolMessage("3", tool_call_id="1"), ToolMessage("no JSON", tool_call_id="2")])
    answered, *replies = provider.requests[-1].body["messages"]
    assert answered["content"] == "said"
    told = [(call["id"], call["function"]["arguments"]) for call in answered["tool_calls"]]
    assert told == [("1", "{}"), ("2", '{"a": ')]
    assert [reply["tool_call_id"] for reply in replies] == ["1", "2"]


def test_a_call_whose_arguments_are_no_json_is_invalid_and_the_others_are_not(
    chat: ChatCluster, provider: FakeOpenAI
) -> None:
    calls = [
        {"id": str(number), "type": "function", "function": {"name": "add", "arguments": arguments}}
        for number, arguments in enumerate(['{"a": 1}', '{"a": ', "[1]"])
    ]
    provider.reply(tool_calls=calls)
    answer = chat.invoke("x")
    assert [(call["id"], call["args"]) for call in answer.tool_calls] == [("0", {"a": 1})]
    assert [(call["id"], call["args"]) for call in answer.invalid_tool_calls] == [("1", '{"a": '), ("2", "[1]")]


def test_errors_of_the_job_and_settings_that_are_the_nodes_are_told(chat: ChatCluster, provider: FakeOpenAI) -> None:
    provider.fail(400, message="too long", times=2)
    with pytest.raises(ProviderError, match="too long"):
        chat.invoke("x")
    with pytest.raises(ProviderError, match="too long"):
        list(chat.stream("x"))
    with pytest.raises(InvalidArguments, match="temperature: Input should be less than or equal to 2"):
        chat.invoke("x", temperature=3)
    with pytest.raises(ValidationError, match="api_key"):
        ChatCluster(api_key="x")  # type: ignore[call-arg]


# The cache.


def test_an_answer_is_made_once_and_a_degraded_one_is_made_again(app: Celery, provider: FakeOpenAI) -> None:
    cache = ClusterCache(namespace=f"n{uuid4().hex}", app=app)
    model = ChatCluster(timeout=WITHIN_S, app=app, cache=cache, temperature=0.5)
    before = provider.counts[CHAT_PATH]
    first, second = model.invoke("asked twice"), model.invoke("asked twice")
    assert (first.content, provider.counts[CHAT_PATH] - before) == (second.content, 1)
    assert model.invoke("asked twice", temperature=0.6).content == "asked twice"
    assert provider.counts[CHAT_PATH] - before == 2
    provider.fail(500)
    answers = [model.invoke("another") for _ in range(2)]
    assert [answer.response_metadata["degraded"] for answer in answers] == [True, False]


def test_answers_of_models_that_stop_elsewhere_are_not_mixed_up(app: Celery, provider: FakeOpenAI) -> None:
    cache = ClusterCache(namespace=f"n{uuid4().hex}", app=app)
    before = provider.counts[CHAT_PATH]
    for stop in (None, ["END"], ["STOP"], ["END"]):
        ChatCluster(timeout=WITHIN_S, app=app, cache=cache, stop=stop).invoke("asked of several")
    assert provider.counts[CHAT_PATH] - before == 3
    # Said in the call or by the model: it is one and the same.
    ChatCluster(timeout=WITHIN_S, app=app, cache=cache).invoke("asked of several", stop=["END"])
    assert provider.counts[CHAT_PATH] - before == 3


def test_models_of_others_are_cached_and_damage_is_a_miss(app: Celery, caplog: pytest.LogCaptureFixture) -> None:
    namespace = f"n{uuid4().hex}"
    cache = ClusterCache(namespace=namespace, tenant="acme", app=app)
    model = GenericFakeChatModel(messages=iter([AIMessage("only one")]), cache=cache)
    assert [model.invoke("x").content for _ in range(2)] == ["only one"] * 2
    kept = cluster_of(app).caches.namespace(namespace, tenant="acme")
    cache.update("p", "m", [Generation(text="t")])
    assert ClusterCache(namespace=namespace, app=app).lookup("p", "m") is None
    other_class = {"generation_info": None, "message": {"type": "PromptTemplate", "data": {}}}
    for damage in (b"{", json.dumps([other_class]).encode()):
        kept.set(digest("p", "m"), damage)
        assert cache.lookup("p", "m") is None
    assert caplog.text.count("cannot be read") == 2
