"""The OpenAI-compatible providers against ``FakeOpenAI``, through real sockets."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletionChunk

from cluster_tasks.errors import ConfigurationError, ProviderError, ProviderUnavailable
from cluster_tasks.providers import (
    ChatProvider,
    ChatRequest,
    ChatResult,
    EmbeddingProvider,
    EmbeddingRequest,
    HashEmbeddings,
    RerankProvider,
    RerankRequest,
    chat_provider,
    embedding_provider,
    rerank_provider,
)
from cluster_tasks.providers.openai import StreamedAnswer
from cluster_tasks.settings import ClusterSettings
from cluster_tasks.testing import CHAT_PATH, EMBEDDINGS_PATH, RERANK_PATH, FakeOpenAI
from tests.waiting import wait_until

KEY = "sk-very-secret"
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}
SOON_S = 0.01
"""A Retry-After that keeps tests quick."""


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server() -> Iterator[FakeOpenAI]:
    with FakeOpenAI() as server:
        yield server


@pytest.fixture
def connect(server: FakeOpenAI) -> Iterator[Callable[..., ChatProvider]]:
    opened: list[ChatProvider] = []

    def connect(**settings: Any) -> ChatProvider:
        given = {"llm_base_url": server.base_url, "llm_model": "fake-chat", "provider_max_retries": 2, **settings}
        opened.append(chat_provider(ClusterSettings(**given)))
        return opened[-1]

    yield connect
    for provider in opened:
        provider.close()


@pytest.fixture
def embeddings(server: FakeOpenAI) -> Iterator[EmbeddingProvider]:
    settings = ClusterSettings.model_validate(
        {"embedding_base_url": server.base_url, "embedding_model": "fake-embedding", "embedding_api_key": KEY}
    )
    provider = embedding_provider(settings)
    yield provider
    provider.close()


@pytest.fixture
def reranker(server: FakeOpenAI) -> Iterator[RerankProvider]:
    settings = ClusterSettings.model_validate(
        {"rerank_base_url": server.base_url, "rerank_model": "fake-rerank", "rerank_api_key": KEY,
         "provider_max_retries": 1}
    )  # fmt: skip
    provider = rerank_provider(settings)
    yield provider
    provider.close()


@pytest.fixture
def sdk(server: FakeOpenAI) -> Iterator[OpenAI]:
    with OpenAI(base_url=server.base_url, api_key="any", max_retries=0) as client:
        yield client


def ask(text: str = "hello there", **given: Any) -> ChatRequest:
    return ChatRequest(messages=({"role": "user", "content": text},), **given)


def test_chat_brings_text_model_usage_and_reason(connect: Callable[..., ChatProvider]) -> None:
    result = connect().chat(ask())
    assert result.model_dump(mode="json") == {
        "text": "hello there",
        "tool_calls": [],
        "model": "fake-chat",
        "usage": {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4},
        "finish_reason": "stop",
        "provider": "openai",
        "degraded": False,
        "degraded_reason": "",
        "cached": False,
        "age_s": 0.0,
        "quotes": [],
    }


def test_all_parameters_reach_the_server(server: FakeOpenAI, connect: Callable[..., ChatProvider]) -> None:
    sent: dict[str, Any] = {
        "temperature": 0.5,
        "max_tokens": 9,
        "stop": ["END"],
        "tools": [TOOL],
        "response_format": {"type": "text"},
    }
    connect().chat(ask(model="other", extra={"seed": 7, "top_k": 3}, passages=("not sent",), **sent))
    messages = [{"role": "user", "content": "hello there"}]
    assert server.requests[-1].body == {"messages": messages, "model": "other", "seed": 7, "top_k": 3, **sent}


def test_what_is_not_given_is_not_sent(server: FakeOpenAI, connect: Callable[..., ChatProvider]) -> None:
    connect().chat(ask())
    assert server.requests[-1].body.keys() == {"messages", "model"}


def test_tool_calls_are_returned_and_can_be_answered(server: FakeOpenAI, connect: Callable[..., ChatProvider]) -> None:
    provider = connect()
    server.reply(tool_calls=[CALL])
    result = provider.chat(ask("weather in Bonn?", tools=[TOOL]))
    assert (result.text, result.tool_calls, result.finish_reason) == ("", [CALL], "tool_calls")
    messages = (
        {"role": "user", "content": "weather in Bonn?"},
        {"role": "assistant", "content": None, "tool_calls": result.tool_calls},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    )
    server.reply("It rains.")
    assert provider.chat(ChatRequest(messages=messages)).text == "It rains."
    assert server.requests[-1].body["messages"] == list(messages)


def test_embeddings_are_float32_in_the_order_of_the_texts(server: FakeOpenAI, embeddings: EmbeddingProvider) -> None:
    request = EmbeddingRequest(texts=("first text", "second text"))
    result = embeddings.embed(request)
    assert result.vectors.dtype == np.float32
    assert np.array_equal(result.vectors, HashEmbeddings().embed(request).vectors)
    assert (result.model, result.provider, result.usage.total_tokens) == ("fake-embedding", "openai", 4)
    assert server.counts[EMBEDDINGS_PATH] == 1


TEXTS = ("A cat sleeps.", "A hen lays eggs.", "An owl hoots at night.")


def rank(query: str = "who lays eggs", top: int = 3, **given: Any) -> RerankRequest:
    return RerankRequest(query=query, texts=TEXTS, scores=(0.9, 0.8, 0.7), top=top, **given)


def test_texts_are_ranked_in_one_request(server: FakeOpenAI, reranker: RerankProvider) -> None:
    result = reranker.rerank(rank(top=2))
    assert [(each.index, each.score) for each in result.ranking] == [(1, pytest.approx(2 / 3)), (0, 0.0)]
    assert (result.model, result.provider, result.usage.total_tokens) == ("fake-rerank", "rerank", 15)
    body = {"model": "fake-rerank", "query": "who lays eggs", "documents": list(TEXTS), "top_n": 2}
    assert server.requests[-1].body == body
    assert server.requests[-1].headers["authorization"] == f"Bearer {KEY}"
    assert reranker.rerank(rank(model="other")).model == "other"
    assert server.counts[RERANK_PATH] == 2


def test_a_ranking_is_ordered_by_its_scores_of_equals_as_the_search_did(
    server: FakeOpenAI, reranker: RerankProvider
) -> None:
    server.rank([{"index": index, "relevance_score": score} for index, score in ((0, -1), (2, 0.5), (1, 0.5))])
    assert [each.index for each in reranker.rerank(rank(top=2)).ranking] == [1, 2]


@pytest.mark.parametrize(
    ("results", "reason"),
    [
        (None, "valid list"),
        ("none", "valid list"),
        ([{"index": 0, "relevance_score": 1.0}], "3 texts were wanted, 1 came"),
        ([{"index": n, "relevance_score": 1.0} for n in (0, 1, 3)], "indexes are not those of 3 texts"),
        ([{"index": n, "relevance_score": 1.0} for n in (0, 1, 1)], "indexes are not those of 3 texts"),
        ([{"index": -1, "relevance_score": 1.0}], "greater than or equal to 0"),
        ([{"index": 0, "relevance_score": float("nan")}], "finite number"),
        ([{"index": 0, "score": 1.0}], "Field required"),
        ([{"index": "0", "relevance_score": 1.0}], "valid integer"),
    ],
)
def test_a_reply_that_is_no_ranking_is_refused_and_not_guessed_from(
    results: Any, reason: str, server: FakeOpenAI, reranker: RerankProvider
) -> None:
    server.rank(results)
    with pytest.raises(ProviderError, match=rf"the reply is no ranking: .*{reason}"):
        reranker.rerank(rank())


def test_a_reranker_is_repeated_and_unavailable_like_the_others(server: FakeOpenAI, reranker: RerankProvider) -> None:
    server.fail(429, retry_after_s=SOON_S)
    assert reranker.rerank(rank()).ranking
    server.fail(503, times=2, retry_after_s=SOON_S)
    with pytest.raises(ProviderUnavailable, match="503"):
        reranker.rerank(rank())
    server.fail(422, message="too many documents")
    with pytest.raises(ProviderError, match=r"422.*too many documents"):
        reranker.rerank(rank())
    assert server.counts[RERANK_PATH] == 5


def test_a_429_is_repeated_until_it_succeeds(server: FakeOpenAI, connect: Callable[..., ChatProvider]) -> None:
    server.fail(429, times=2, retry_after_s=SOON_S)
    assert connect().chat(ask()).text == "hello there"
    assert server.counts[CHAT_PATH] == 3


@pytest.mark.parametrize("status", [429, 500, 503])
def test_errors_that_do_not_pass_end_as_unavailable(
    status: int, server: FakeOpenAI, connect: Callable[..., ChatProvider]
) -> None:
    server.fail(status, times=None, message="overloaded", retry_after_s=SOON_S)
    with pytest.raises(ProviderUnavailable, match=rf"127\.0\.0\.1.*{status}.*overloaded"):
        connect().chat(ask())
    assert server.counts[CHAT_PATH] == 3


def test_a_retry_after_beyond_patience_ends_at_once(server: FakeOpenAI, connect: Callable[..., ChatProvider]) -> None:
    server.fail(429, retry_after_s=3600)
    with pytest.raises(ProviderUnavailable):
        connect().chat(ask())
    assert server.counts[CHAT_PATH] == 1


@pytest.mark.parametrize("status", [400, 403, 404, 422])
def test_a_refused_request_is_not_repeated(
    status: int, server: FakeOpenAI, connect: Callable[..., ChatProvider]
) -> None:
    server.fail(status, message="context too long")
    with pytest.raises(ProviderError, match=rf"{status}.*context too long") as caught:
        connect().chat(ask())
    assert not isinstance(caught.value, ProviderUnavailable)
    assert server.counts[CHAT_PATH] == 1


def test_a_hanging_server_is_a_time_out(server: FakeOpenAI, connect: Callable[..., ChatProvider]) -> None:
    server.hang(times=None)
    with pytest.raises(ProviderUnavailable, match="timed out"):
        connect(llm_timeout_s=0.2, provider_max_retries=1).chat(ask())
    wait_until(lambda: len(server.requests) == 2, message="the server has read them")
    assert [request.headers["x-stainless-read-timeout"] for request in server.requests] == ["0.2", "0.2"]


def test_a_reply_that_breaks_off_is_repeated(server: FakeOpenAI, connect: Callable[..., ChatProvider]) -> None:
    server.cut_off()
    assert connect().chat(ask()).text == "hello there"
    assert server.counts[CHAT_PATH] == 2


def test_a_server_that_is_not_there_is_unavailable(connect: Callable[..., ChatProvider]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(ProviderUnavailable, match=f"{port}.*refused"):
        connect(llm_base_url=f"http://127.0.0.1:{port}/v1", provider_max_retries=0).chat(ask())


def test_a_url_that_is_no_api_is_a_clear_error(server: FakeOpenAI, connect: Callable[..., ChatProvider]) -> None:
    with pytest.raises(ProviderError, match=r"404.*no such path"):
        connect(llm_base_url=server.base_url.removesuffix("/v1")).chat(ask())


def test_a_key_goes_as_bearer(server: FakeOpenAI, connect: Callable[..., ChatProvider]) -> None:
    connect(llm_api_key=f"{KEY}\n").chat(ask())
    assert server.requests[-1].headers["authorization"] == f"Bearer {KEY}"


def test_each_provider_sends_its_own_key(
    server: FakeOpenAI, connect: Callable[..., ChatProvider], embeddings: EmbeddingProvider
) -> None:
    connect(llm_api_key="sk-other").chat(ask())
    embeddings.embed(EmbeddingRequest(texts=("a",)))
    assert [request.headers["authorization"] for request in server.requests] == ["Bearer sk-other", f"Bearer {KEY}"]


def test_without_a_key_none_of_the_environment_is_sent(
    server: FakeOpenAI, connect: Callable[..., ChatProvider], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, KEY)
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", f"Authorization: Bearer {KEY}")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    connect().chat(ask())
    headers = server.requests[-1].headers
    assert "authorization" not in headers
    assert KEY not in str(headers)


def test_a_login_in_the_url_is_sent_and_never_shown(
    server: FakeOpenAI, connect: Callable[..., ChatProvider], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    provider = connect(llm_base_url=server.base_url.replace("127", "ada:s%40fe@127", 1))
    provider.chat(ask())
    assert server.requests[-1].headers["authorization"] == "Basic YWRhOnNAZmU="
    server.fail(400)
    with pytest.raises(ProviderError) as caught:
        provider.chat(ask())
    assert not [word for word in ("s%40fe", "s@fe", "YWRhOnNAZmU") if word in caplog.text + str(caught.value)]


def test_a_key_is_in_no_repr_error_or_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with FakeOpenAI(api_key="another") as server:
        settings = ClusterSettings.model_validate(
            {"llm_base_url": server.base_url, "llm_model": "m", "llm_api_key": KEY}
        )
        provider = chat_provider(settings)
        # The server repeats the key in its message, as some do.
        with pytest.raises(ProviderError, match=r"401 - wrong credentials: Bearer \*\*") as caught:
            provider.chat(ask())
        provider.close()
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    shown = [repr(caught.value), str(caught.value), repr(provider), repr(vars(provider)), caplog.text]
    assert not [text for text in shown if KEY in text]


def test_a_key_that_no_header_can_carry_is_refused_unseen(connect: Callable[..., ChatProvider]) -> None:
    with pytest.raises(ConfigurationError, match="CLUSTER_LLM_API_KEY") as caught:
        connect(llm_api_key="sk-very\nsecret")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["127.0.0.1:1234/v1", "ftp://h/v1", "http://", "http://h:x/v1", "http://h/v1?a=b"])
def test_a_url_that_cannot_work_is_refused(url: str, connect: Callable[..., ChatProvider]) -> None:
    with pytest.raises(ConfigurationError, match="CLUSTER_LLM_BASE_URL"):
        connect(llm_base_url=url)


def test_without_any_model_the_error_names_the_setting(
    server: FakeOpenAI, connect: Callable[..., ChatProvider]
) -> None:
    provider = connect(llm_model=None)
    with pytest.raises(ConfigurationError, match="CLUSTER_LLM_MODEL"):
        provider.chat(ask())
    assert provider.chat(ask(model="named")).model == "named"
    assert server.counts[CHAT_PATH] == 1


def test_a_closed_provider_can_be_used_again(connect: Callable[..., ChatProvider]) -> None:
    provider = connect()
    provider.close()
    provider.chat(ask())
    provider.close()
    provider.close()
    assert provider.chat(ask("again")).text == "again"


def test_threads_share_a_provider(server: FakeOpenAI, connect: Callable[..., ChatProvider]) -> None:
    provider = connect()
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda number: provider.chat(ask(str(number))).text, range(40)))
    assert texts == [str(number) for number in range(40)]
    assert server.counts[CHAT_PATH] == 40


FORKING = """
import os, sys
from cluster_tasks.providers import ChatRequest, chat_provider
from cluster_tasks.settings import ClusterSettings

provider = chat_provider(ClusterSettings(llm_base_url=sys.argv[1], llm_model="m"))
def say(text):
    return provider.chat(ChatRequest(messages=[{"role": "user", "content": text}])).text
say("before")
child = os.fork()
if not child:
    os._exit(0 if [say(f"child {i}") for i in range(20)] == [f"child {i}" for i in range(20)] else 1)
mine = [say(f"parent {i}") for i in range(20)] == [f"parent {i}" for i in range(20)]
sys.exit(os.waitpid(child, 0)[1] or not mine)
"""


def run_python(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)


def test_parent_and_child_of_a_fork_share_no_connection() -> None:
    with FakeOpenAI() as server:
        done = run_python(FORKING, server.base_url)
    assert (done.returncode, done.stderr) == (0, "")
    ports: dict[str, set[int]] = {}
    for request in server.requests:
        ports.setdefault(request.body["messages"][0]["content"].split()[0], set()).add(request.client_port)
    assert ports["before"] == ports["parent"]
    assert not ports["parent"] & ports["child"]


def test_the_sdk_is_imported_by_the_first_request_only() -> None:
    program = (
        "import sys; from cluster_tasks.providers import chat_provider; from cluster_tasks.settings import *;"
        "chat_provider(ClusterSettings(llm_base_url='http://127.0.0.1:1/v1', llm_model='m'));"
        "sys.exit('openai' in sys.modules)"
    )
    done = run_python(program)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_fake_lists_models(sdk: OpenAI) -> None:
    assert [model.id for model in sdk.models.list()] == ["fake-chat", "fake-embedding"]


# Streamed.


def streamed(provider: ChatProvider, request: ChatRequest) -> tuple[ChatResult, list[str]]:
    told: list[str] = []
    return provider.stream(request, told.append), told


def test_a_streamed_answer_is_told_in_pieces_and_is_the_same_in_the_end(connect: Callable[..., ChatProvider]) -> None:
    provider = connect()
    result, told = streamed(provider, ask("hello there you"))
    assert told == ["hello ", "there ", "you"]
    assert result == provider.chat(ask("hello there you"))


def test_the_calls_of_a_streamed_answer_are_those_of_a_whole_one(
    server: FakeOpenAI, connect: Callable[..., ChatProvider]
) -> None:
    server.reply(tool_calls=[CALL, {**CALL, "id": "call_2"}])
    result, told = streamed(connect(), ask("weather in Bonn?", tools=[TOOL]))
    assert (told, result.text, result.finish_reason) == ([], "", "tool_calls")
    assert result.tool_calls == [CALL, {**CALL, "id": "call_2"}]


def test_pieces_of_a_call_are_put_together() -> None:
    answer = StreamedAnswer()
    for call in (
        {"index": 0, "id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ""}},
        {"index": 0, "function": {"arguments": '{"city": '}},
        {"index": 0, "function": {"arguments": '"Bonn"}'}},
        # Of a server that sends calls whole and without an index.
        {"id": "call_2", "type": "function", "function": {"name": "weather", "arguments": "{}"}},
    ):
        delta = {"delta": {"tool_calls": [call]}, "index": 0}
        answer.add(ChatCompletionChunk.construct(choices=[delta]))
    second = {"id": "call_2", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    assert answer.tool_calls() == [CALL, second]


def test_a_stream_is_repeated_before_it_has_begun(server: FakeOpenAI, connect: Callable[..., ChatProvider]) -> None:
    server.fail(429, times=2, retry_after_s=SOON_S)
    assert streamed(connect(), ask())[0].text == "hello there"
    assert server.counts[CHAT_PATH] == 3


@pytest.mark.parametrize("events", [None, 2], ids=["by the connection", "as if that were all"])
def test_a_stream_that_breaks_off_is_unavailable_and_not_repeated(
    events: int | None, server: FakeOpenAI, connect: Callable[..., ChatProvider]
) -> None:
    server.cut_off(events=events)
    told: list[str] = []
    with pytest.raises(ProviderUnavailable):
        connect().stream(ask("one two three four"), told.append)
    assert told[0] == "one "
    assert server.counts[CHAT_PATH] == 1


@pytest.mark.parametrize(("status", "kind"), [(503, ProviderUnavailable), (429, ProviderUnavailable), (400, None)])
def test_an_error_within_a_stream_says_whether_it_passes(
    status: int, kind: type[ProviderError] | None, server: FakeOpenAI, connect: Callable[..., ChatProvider]
) -> None:
    server.fail(status, events=2, message="no more")
    with pytest.raises(ProviderError, match="no more") as caught:
        streamed(connect(), ask())
    assert type(caught.value) is (kind or ProviderError)


def test_a_stream_that_falls_silent_is_a_time_out(server: FakeOpenAI, connect: Callable[..., ChatProvider]) -> None:
    server.hang(times=None, events=2)
    with pytest.raises(ProviderUnavailable, match="timed out"):
        streamed(connect(llm_timeout_s=0.2), ask())


def test_an_error_of_the_listener_ends_the_request_and_comes_through(
    server: FakeOpenAI, connect: Callable[..., ChatProvider]
) -> None:
    def refuse(text: str) -> None:
        raise ValueError(text)

    server.pace_s = 0.02
    with pytest.raises(ValueError, match="one"):
        connect().stream(ask("one two three " * 100), refuse)
    wait_until(lambda: server.left == 1, message="the provider is told to stop")


def test_a_web_page_is_no_stream(server: FakeOpenAI, connect: Callable[..., ChatProvider]) -> None:
    with pytest.raises(ProviderError):
        streamed(connect(llm_base_url=server.base_url.removesuffix("/v1")), ask())


def test_the_fake_streams_an_answer_word_by_word(sdk: OpenAI) -> None:
    stream = sdk.chat.completions.create(
        model="m",
        messages=[{"role": "user", "content": "one  two three"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = list(stream)
    words = [chunk.choices[0].delta.content for chunk in chunks]
    assert "".join(word or "" for word in words) == "one  two three"
    assert len(words) > 3
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert last.usage
    assert last.usage.completion_tokens == 3


def test_the_fake_streams_tool_calls(server: FakeOpenAI, sdk: OpenAI) -> None:
    server.reply(tool_calls=[CALL])
    stream = sdk.chat.completions.create(model="m", messages=[{"role": "user", "content": "x"}], stream=True)
    calls = [call for chunk in stream for call in chunk.choices[0].delta.tool_calls or ()]
    assert [call.function.name for call in calls if call.function] == ["weather"]


def test_the_fake_embeds_as_floats_and_as_base64_alike(sdk: OpenAI) -> None:
    forms: list[Any] = [
        sdk.embeddings.create(model="m", input="a text", dimensions=8, encoding_format=form).data[0].embedding
        for form in ("float", "base64")
    ]
    floats, packed = forms
    assert len(floats) == 8
    assert isinstance(packed, str)
    assert sdk.embeddings.create(model="m", input=["a text"], dimensions=8).data[0].embedding == floats


@pytest.mark.parametrize("raw", [b"no json", b"[]", b"{}", b'{"messages": [{"role": "user"}]}'])
def test_the_fake_refuses_a_bad_body(raw: bytes, server: FakeOpenAI) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(urllib.request.Request(f"{server.base_url}/chat/completions", raw))
    with caught.value:
        assert caught.value.code == 400
        assert "message" in json.load(caught.value)["error"]


def test_a_released_request_is_answered(server: FakeOpenAI, connect: Callable[..., ChatProvider]) -> None:
    server.hang()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(connect().chat, ask())
        wait_until(lambda: server.counts[CHAT_PATH] == 1)
        assert not waiting.done()
        server.release()
        assert waiting.result(timeout=30).text == "hello there"
    assert server.counts[CHAT_PATH] == 1


def test_stopping_ends_hanging_slow_and_idle_connections(connect: Callable[..., ChatProvider]) -> None:
    before = set(threading.enumerate())
    server = FakeOpenAI().start()
    given = {"llm_base_url": server.base_url, "provider_max_retries": 0}
    connect(**given).chat(ask())  # Its connection stays open, idle.
    server.hang()
    with ThreadPoolExecutor(2) as pool:
        hanging = pool.submit(connect(**given).chat, ask())
        wait_until(lambda: server.counts[CHAT_PATH] == 2)
        server.latency_s = 3600
        slow = pool.submit(connect(**given).chat, ask())
        wait_until(lambda: server.counts[CHAT_PATH] == 3)
        server.stop()
        for waiting in (hanging, slow):
            waiting.exception(timeout=30)
    wait_until(lambda: set(threading.enumerate()) <= before)


def test_a_fake_may_be_stopped_before_it_started_and_twice_and_started_again() -> None:
    server = FakeOpenAI()
    server.stop()
    assert server.start().base_url == server.start().base_url
    server.stop()
    server.stop()
    with pytest.raises(RuntimeError):
        _ = server.base_url
    with server, OpenAI(base_url=server.base_url, api_key="any") as client:
        assert list(client.models.list())


def test_a_fake_recovers_from_faults_without_end(server: FakeOpenAI, connect: Callable[..., ChatProvider]) -> None:
    server.fail(500, times=None)
    provider = connect(provider_max_retries=0)
    with pytest.raises(ProviderUnavailable):
        provider.chat(ask())
    server.recover()
    assert provider.chat(ask()).text == "hello there"
