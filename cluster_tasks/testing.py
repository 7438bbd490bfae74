"""Public fakes, for tests of this package and of code that uses it.

``FakeOpenAI`` is an OpenAI-compatible server on a free loopback port, with real sockets and answers that never
change, that can be told to misbehave::

    with FakeOpenAI() as server:
        settings = ClusterSettings(llm_base_url=server.base_url, llm_model="fake-chat")
        server.fail(429, times=2, retry_after_s=0.01)
        request = ChatRequest(messages=[{"role": "user", "content": "hello"}])
        assert chat_provider(settings).chat(request).text == "hello"
        assert server.counts["/v1/chat/completions"] == 3
"""

from __future__ import annotations

import base64
import json
import socket
import socketserver
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain, repeat
from typing import Any, Literal, Self

from cluster_tasks.providers.base import EmbeddingRequest
from cluster_tasks.providers.local import HashEmbeddings, text_of, words_of

CHAT_PATH = "/v1/chat/completions"
EMBEDDINGS_PATH = "/v1/embeddings"
MODELS_PATH = "/v1/models"
RERANK_PATH = "/v1/rerank"
MODELS = ("fake-chat", "fake-embedding")


@dataclass(frozen=True, slots=True)
class ReceivedRequest:
    """A request as it came in."""

    path: str
    headers: Mapping[str, str]
    """By lower-case name."""
    body: Mapping[str, Any]
    """Empty if there was none."""
    client_port: int
    """Of the connection: requests that share it came over one connection."""


@dataclass(frozen=True, slots=True)
class _Fault:
    kind: Literal["status", "hang", "cut_off"]
    status: int = 0
    message: str = ""
    retry_after_s: float | None = None
    events: int | None = None
    """It happens after so many events of an answer that is streamed; None: before all of it."""


class _Refusal(Exception):
    def __init__(self, status: int, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.retry_after_s = status, message, retry_after_s


class FakeOpenAI:
    """An OpenAI-compatible server that answers chat with the last user message and embeds by ``local-hash``.

    Serves ``POST /v1/chat/completions`` (whole or as server-sent events), ``POST /v1/embeddings`` (floats or
    base64), ``POST /v1/rerank`` (by the share of the query's words that a text has) and ``GET /v1/models``. Faults
    are used up in the order in which they were asked for, one by each request; ``times=None`` means from now on,
    until ``recover``. All methods may be called from any thread.
    """

    def __init__(
        self, *, latency_s: float = 0.0, api_key: str | None = None, dimensions: int = 384, pace_s: float = 0.0,
        answer: Callable[[Mapping[str, Any]], Mapping[str, Any] | None] | None = None,
    ) -> None:  # fmt: skip
        self.latency_s = latency_s
        """How long every answer waits."""
        self.pace_s = pace_s
        """How long an answer that is streamed waits before each of its events."""
        self.api_key = api_key
        """The only key that is let in; None: any request is."""
        self.dimensions = dimensions
        self.answer = answer
        """Makes the message that answers a chat, of the body of its request; where it returns None, the echo does."""
        self.most_texts: int | None = None
        """How many texts one request may have embedded; None: any number."""
        self.requests: deque[ReceivedRequest] = deque(maxlen=1000)
        """The last requests, the newest at the end."""
        self.counts: Counter[str] = Counter()
        """Requests by path, failed ones too."""
        self.left = 0
        """Answers whose client went away before their end."""
        self._faults: Iterator[_Fault] = iter(())
        self._replies: deque[dict[str, Any]] = deque()
        self._rankings: deque[Any] = deque()
        self._lock = threading.Lock()
        self._released = threading.Event()
        self._stopping = threading.Event()
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def base_url(self) -> str:
        """What to set as base URL. Raises RuntimeError while the server is stopped."""
        if self._server is None:
            raise RuntimeError("the server is not started")
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def start(self) -> Self:
        """Listen on a free port of the loopback. Does nothing if it listens already."""
        if self._server is None:
            self._stopping.clear()
            self._server = _Server(self)
            self._thread = threading.Thread(
                target=self._server.serve_forever, args=(0.02,), name="fake-openai", daemon=True
            )
            self._thread.start()
        return self

    def stop(self) -> None:
        """End every connection, answered or not, and wait for the threads. May come before start, and twice."""
        if self._server is None or self._thread is None:
            return
        # In this order: whoever misses the release sees that the server stops.
        self._stopping.set()
        self.release()
        self._server.shutdown()
        self._thread.join()
        self._server.end_connections()
        self._server.server_close()
        self._server = self._thread = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def reply(
        self, content: str | None = None, *, tool_calls: Iterable[Mapping[str, Any]] = (), finish_reason: str = ""
    ) -> None:
        """Answer the next chat with this message instead of the echo. Calls queue up."""
        calls = list(tool_calls)
        message = {"role": "assistant", "content": content, **({"tool_calls": calls} if calls else {})}
        reason = finish_reason or ("tool_calls" if calls else "stop")
        self._replies.append({"message": message, "finish_reason": reason})

    def rank(self, results: Any) -> None:
        """Answer the next reranking with these ``results``, whatever they are. Calls queue up."""
        self._rankings.append(results)

    def fail(
        self, status: int, *, times: int | None = 1, message: str = "told to fail", retry_after_s: float | None = None,
        events: int | None = None,
    ) -> None:  # fmt: skip
        """Answer the next requests with this status and an error of that message.

        With ``events``, the error comes in a stream, after so many of its events.
        """
        self._add(_Fault("status", status, message, retry_after_s, events), times)

    def hang(self, *, times: int | None = 1, events: int | None = None, status: int = 0) -> None:
        """Let the next requests wait until ``release`` or ``stop``; released ones are then answered.

        With ``events``, a stream waits after so many of them, and with ``status`` goes on with an error of that.
        """
        self._add(_Fault("hang", status, "told to fail", events=events), times)

    def cut_off(self, *, times: int | None = 1, events: int | None = None) -> None:
        """Close the connections of the next requests in the middle of the answer.

        With ``events``, a stream ends after so many of them, as if that were all of it.
        """
        self._add(_Fault("cut_off", events=events), times)

    def release(self) -> None:
        """Let the requests that hang go on."""
        with self._lock:
            released, self._released = self._released, threading.Event()
        released.set()

    def recover(self) -> None:
        """Forget the faults that were not used yet, and let the requests that hang go on."""
        with self._lock:
            self._faults = iter(())
        self.release()

    def _add(self, fault: _Fault, times: int | None) -> None:
        with self._lock:
            self._faults = chain(self._faults, repeat(fault) if times is None else repeat(fault, times))

    def _receive(self, request: ReceivedRequest) -> _Fault | None:
        """Record a request and wait as told. Returns the fault its answer must show."""
        with self._lock:
            self.counts[request.path] += 1
            self.requests.append(request)
            fault, released = next(self._faults, None), self._released
        self._stopping.wait(self.latency_s)
        if fault and fault.kind == "hang" and fault.events is None and not self._stopping.is_set():
            released.wait()
        return fault

    def _stream(self, events: Sequence[bytes], fault: _Fault | None) -> Iterator[bytes]:
        """The events of an answer, at their pace, until the fault has its way."""
        with self._lock:
            released = self._released
        for number, event in enumerate(events):
            if fault and number == fault.events:
                if fault.kind == "hang" and not self._stopping.is_set():
                    released.wait()
                if fault.kind == "cut_off":
                    return
                if fault.status:
                    yield _event({"error": {"message": fault.message, "type": "fake_error", "code": fault.status}})
                    return
            if self.pace_s:
                self._stopping.wait(self.pace_s)
            yield event

    def _note_left(self) -> None:
        with self._lock:
            self.left += 1

    def _check(self, request: ReceivedRequest, fault: _Fault | None) -> None:
        if self.api_key and request.headers.get("authorization") != f"Bearer {self.api_key}":
            raise _Refusal(401, f"wrong credentials: {request.headers.get('authorization')}")
        if fault and fault.kind == "status" and fault.events is None:
            raise _Refusal(fault.status, fault.message, fault.retry_after_s)

    def _chat(self, body: Mapping[str, Any]) -> dict[str, Any]:
        messages = _required(body, "messages")
        with self._lock:
            choice = self._replies.popleft() if self._replies else None
        if choice is None and self.answer and (message := self.answer(body)) is not None:
            reason = "tool_calls" if message.get("tool_calls") else "stop"
            choice = {"message": {"role": "assistant", "content": None, **message}, "finish_reason": reason}
        if choice is None:
            said = [text_of(message) for message in messages if message.get("role") == "user"] or [""]
            choice = {"message": {"role": "assistant", "content": said[-1]}, "finish_reason": "stop"}
        return {
            "id": "chatcmpl-fake",
            "object": "chat.completion",
            "created": 0,
            "model": _required(body, "model"),
            "choices": [{"index": 0, **choice}],
            "usage": _usage(map(text_of, messages), choice["message"]["content"] or ""),
        }

    def _embeddings(self, body: Mapping[str, Any]) -> dict[str, Any]:
        given = _required(body, "input")
        texts = (given,) if isinstance(given, str) else tuple(given)
        if not all(isinstance(text, str) for text in texts):
            raise _Refusal(400, "this server takes texts, not tokens")
        if self.most_texts is not None and len(texts) > self.most_texts:
            raise _Refusal(400, f"{len(texts)} texts are more than {self.most_texts}")
        embeddings = HashEmbeddings(body.get("dimensions") or self.dimensions)
        vectors = embeddings.embed(EmbeddingRequest(texts=texts)).vectors
        encoded = (
            [base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in vectors]
            if body.get("encoding_format") == "base64"
            else vectors.tolist()
        )
        return {
            "object": "list",
            "model": _required(body, "model"),
            "data": [{"object": "embedding", "index": i, "embedding": item} for i, item in enumerate(encoded)],
            "usage": _usage(texts),
        }

    def _rerank(self, body: Mapping[str, Any]) -> dict[str, Any]:
        query, texts = _required(body, "query"), _required(body, "documents")
        words = set(words_of(query))
        scores = [len(words & set(words_of(text))) / max(1, len(words)) for text in texts]
        best = sorted(range(len(texts)), key=lambda index: -scores[index])[: body.get("top_n") or len(texts)]
        results: Any = [{"index": index, "relevance_score": scores[index]} for index in best]
        with self._lock:
            results = self._rankings.popleft() if self._rankings else results
        return {"model": _required(body, "model"), "results": results, "usage": _usage([query, *texts])}


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    # Head and body are two writes; Nagle's algorithm would hold the second back for 40 ms.
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self._serve(b"")

    def do_POST(self) -> None:
        self._serve(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def _serve(self, raw: bytes) -> None:
        fake, body = self.server.fake, _decoded(raw)
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = ReceivedRequest(self.path, headers, body or {}, self.client_address[1])
        fault = fake._receive(request)
        try:
            fake._check(request, fault)
            if body is None:
                raise _Refusal(400, "the body is not a JSON object")
            answer = self._answer(request)
        except _Refusal as exc:
            error = {"error": {"message": exc.message, "type": "fake_error", "code": None, "param": None}}
            self._send(exc.status, [json.dumps(error).encode()], retry_after_s=exc.retry_after_s)
            return
        cut_off = fault is not None and fault.kind == "cut_off" and fault.events is None
        if self.path != CHAT_PATH or not body.get("stream"):
            self._send(200, [json.dumps(answer).encode()], cut_off=cut_off)
            return
        events = list(_events(answer, body))
        self._send_events(fake._stream(events[: len(events) // 2] if cut_off else events, fault), cut_off)

    def _send_events(self, events: Iterable[bytes], cut_off: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            for event in events:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))
            if cut_off:
                self.close_connection = True
            else:
                self.wfile.write(b"0\r\n\r\n")
        except ConnectionError:
            self.server.fake._note_left()
            raise

    def _answer(self, request: ReceivedRequest) -> dict[str, Any]:
        match self.command, self.path:
            case "POST", "/v1/chat/completions":
                return self.server.fake._chat(request.body)
            case "POST", "/v1/embeddings":
                return self.server.fake._embeddings(request.body)
            case "POST", "/v1/rerank":
                return self.server.fake._rerank(request.body)
            case "GET", "/v1/models":
                data = [{"id": name, "object": "model", "created": 0, "owned_by": "fake"} for name in MODELS]
                return {"object": "list", "data": data}
        raise _Refusal(404, f"no such path: {self.command} {self.path}")

    def _send(
        self,
        status: int,
        parts: Sequence[bytes],
        *,
        retry_after_s: float | None = None,
        cut_off: bool = False,
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(sum(map(len, parts))))
        if retry_after_s is not None:
            self.send_header("Retry-After", str(retry_after_s))
        self.end_headers()
        if cut_off:
            whole = b"".join(parts)
            parts, self.close_connection = [whole[: len(whole) // 2]], True
        for part in parts:
            self.wfile.write(part)

    def log_message(self, *args: object) -> None:
        """Stay silent: the test has the requests."""


class _Server(ThreadingHTTPServer):
    request_queue_size = 128

    def __init__(self, fake: FakeOpenAI) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.fake = fake
        self._connections: set[socket.socket] = set()
        self._changed = threading.Condition()

    def server_bind(self) -> None:
        # HTTPServer would look up the name of the host, which may ask a name server.
        socketserver.TCPServer.server_bind(self)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._changed:
            self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        with self._changed:
            self._connections.discard(request)
            self._changed.notify_all()

    def end_connections(self) -> None:
        """Wake the threads that wait for their clients, and wait until each has closed its connection."""
        with self._changed:
            for connection in self._connections:
                with suppress(OSError):  # the client or the thread was faster
                    connection.shutdown(socket.SHUT_RDWR)
            self._changed.wait_for(lambda: not self._connections)

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that leaves early is what time-outs look like from here.
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def _decoded(raw: bytes) -> dict[str, Any] | None:
    """The body: an empty one if there is none, None if it is no JSON object."""
    try:
        body = json.loads(raw or b"{}")
    except ValueError:
        return None
    return body if isinstance(body, dict) else None


def _required(body: Mapping[str, Any], name: str) -> Any:
    if not body.get(name):
        raise _Refusal(400, f"{name} is missing")
    return body[name]


def _usage(asked: Iterable[str], answered: str = "") -> dict[str, int]:
    prompt = sum(len(text.split()) for text in asked)
    completion = len(answered.split())
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _events(answer: Mapping[str, Any], body: Mapping[str, Any]) -> Iterator[bytes]:
    """The server-sent events of an answer: one for each word, as real servers send tokens."""
    [choice] = answer["choices"]
    message = choice["message"]
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    deltas += [{"content": word} for word in (message["content"] or "").replace(" ", " \0").split("\0")]
    deltas += [{"tool_calls": [{"index": i, **call}]} for i, call in enumerate(message.get("tool_calls", ()))]
    chunk = {**answer, "object": "chat.completion.chunk"}
    usage = chunk.pop("usage")
    for delta in deltas:
        yield _event({**chunk, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
    yield _event({**chunk, "choices": [{"index": 0, "delta": {}, "finish_reason": choice["finish_reason"]}]})
    if (body.get("stream_options") or {}).get("include_usage"):
        yield _event({**chunk, "choices": [], "usage": usage})
    yield b"data: [DONE]\n\n"


def _event(data: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"
