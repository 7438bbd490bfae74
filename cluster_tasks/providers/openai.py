"""Providers behind any OpenAI-compatible URL, through the ``openai`` SDK.

The SDK repeats a request after 408, 409, 429, 5xx, a broken connection or a time-out, with growing, jittered
pauses, and honours ``Retry-After`` up to two minutes. It is imported at the first request: that costs most of a
second, which producers and idle workers need not pay.

Only the configured key is sent, and nothing if there is none: the SDK's own ``OPENAI_API_KEY``, ``OPENAI_ORG_ID``
and ``OPENAI_PROJECT_ID`` belong to another URL. Its ``OPENAI_CUSTOM_HEADERS`` and the proxies of the environment
(``HTTPS_PROXY`` …) apply, for they are meant for all URLs.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import SplitResult, unquote, urlsplit

from pydantic import SecretStr

from cluster_tasks.addresses.secret import SecretUrl
from cluster_tasks.errors import ConfigurationError, ProviderError, ProviderUnavailable
from cluster_tasks.providers.base import ChatRequest, ChatResult, EmbeddingRequest, EmbeddingResult, Tell, Usage

if TYPE_CHECKING:
    from openai import OpenAI

CONNECT_TIMEOUT_S = 5.0
PASSING_STATUSES = frozenset({408, 409, 429})
Purpose = Literal["LLM", "EMBEDDING", "RERANK"]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a provider is and how it is spoken to. Raises ConfigurationError for a URL or key that cannot work."""

    purpose: Purpose
    """The word in the names of its settings."""
    base_url: SecretUrl
    """A user and password in it are sent as Basic authorization, unless there is a key."""
    model: str | None = None
    api_key: SecretStr | None = None
    timeout_s: float = 120.0
    """Of one attempt: the longest silence of the server."""
    max_retries: int = 4

    def __post_init__(self) -> None:
        try:
            parts = self.parts
            # The SDK appends its paths to the end of the URL: a query there would swallow them.
            valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and not parts.query
        except ValueError:
            valid = False
        if not valid:
            # Its value stays out: a login in a URL that cannot be taken apart cannot be masked.
            raise ConfigurationError(f"CLUSTER_{self.purpose}_BASE_URL: expected http(s)://host/path without a query")
        # The HTTP client quotes a header it cannot send in its error, key and all.
        if not (self.key.isascii() and self.key.isprintable()):
            raise ConfigurationError(f"CLUSTER_{self.purpose}_API_KEY has characters that no header can carry")

    @property
    def parts(self) -> SplitResult:
        """The parts of the URL."""
        return urlsplit(self.base_url.get_secret_value())

    @property
    def key(self) -> str:
        """The key without the line end that a secret file leaves; empty if there is none."""
        return self.api_key.get_secret_value().strip() if self.api_key else ""

    def authorization(self) -> str | None:
        """The value of the ``Authorization`` header, or None for no header."""
        if self.key:
            return f"Bearer {self.key}"
        if self.parts.username is None:
            return None
        login = f"{unquote(self.parts.username)}:{unquote(self.parts.password or '')}"
        return "Basic " + base64.b64encode(login.encode()).decode()

    def url_without_login(self) -> str:
        """The URL as it is requested. The HTTP client logs it."""
        return self.parts._replace(netloc=self.parts.netloc.rpartition("@")[2]).geturl()

    @property
    def name(self) -> str:
        """What tells it from the other endpoints of a cluster, without secrets."""
        model = f"{self.model}@" if self.model else ""
        return f"{self.purpose.lower()}:{model}{self.url_without_login()}"

    def model_for(self, asked: str | None) -> str:
        """The model of a request, else the configured one. Raises ConfigurationError if there is neither."""
        if model := asked or self.model:
            return model
        raise ConfigurationError(f"no model is named: set CLUSTER_{self.purpose}_MODEL or name one in the request")


class Connection:
    """The SDK's client of one endpoint, one for each process, and the one place where its errors are mapped."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        # A child must not share sockets with its parent. It keeps the parent's client, unused, so that
        # collecting it does not say goodbye on a connection that the parent still uses.
        self._clients: dict[int, OpenAI] = {}

    @property
    def client(self) -> OpenAI:
        """The client of this process, made when it is first asked for."""
        pid = os.getpid()
        # Two threads may both build one; the first that is stored serves both.
        return self._clients.get(pid) or self._clients.setdefault(pid, self._build())

    def _build(self) -> OpenAI:
        from openai import OpenAI, Timeout

        endpoint = self._endpoint
        return OpenAI(
            base_url=endpoint.url_without_login(),
            api_key="unused",  # The header of each request says who asks; without a value the SDK refuses to start.
            timeout=Timeout(endpoint.timeout_s, connect=min(CONNECT_TIMEOUT_S, endpoint.timeout_s)),
            max_retries=endpoint.max_retries,
        )

    def headers(self) -> dict[str, Any]:
        """The headers of a request that say who asks; what the environment says of that is left out."""
        from openai import Omit

        nothing = Omit()
        return {
            "Authorization": self._endpoint.authorization() or nothing,
            "OpenAI-Organization": nothing,
            "OpenAI-Project": nothing,
        }

    @contextmanager
    def errors_mapped(self) -> Iterator[None]:
        """Raise ProviderError or ProviderUnavailable for what the SDK raises.

        The SDK's error is left out of the chain: it holds the request with its key.
        """
        import openai

        try:
            yield
        except openai.APIStatusError as exc:
            raise self.error(exc.message, _kind_of(exc.status_code)) from None
        except openai.APIConnectionError as exc:
            cause = f" {exc.__cause__}" if exc.__cause__ else ""
            raise self.error(f"{exc.message}{cause}", ProviderUnavailable) from None
        except openai.APIError as exc:
            if type(exc) is not openai.APIError:
                raise self.error(f"the reply cannot be read: {exc}") from None
            # An error in the midst of a stream, whose status was 200; it may name another one as its code.
            code = str(exc.code or "")
            raise self.error(exc.message, _kind_of(int(code) if code.isdecimal() else 500)) from None
        except (openai.OpenAIError, ValueError) as exc:
            raise self.error(f"the reply cannot be read: {exc}") from None

    def error(self, detail: str, kind: type[ProviderError] = ProviderError) -> ProviderError:
        """An error that names the endpoint; a key that the provider repeats in its message is masked."""
        if key := self._endpoint.key:
            detail = detail.replace(key, "**")
        return kind(f"{self._endpoint.base_url}: {detail}")

    def close(self) -> None:
        """Close the connections of this process. Safe to repeat, also before first use."""
        if client := self._clients.pop(os.getpid(), None):
            client.close()


class OpenAIChat:
    """Language models behind an OpenAI-compatible URL."""

    name = "openai"

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._connection = Connection(endpoint)

    def chat(self, request: ChatRequest) -> ChatResult:
        """Answer ``request``; of several choices the first. Raises as ``ChatProvider.chat`` does."""
        given = self._parameters(request)
        with self._connection.errors_mapped():
            reply = self._connection.client.chat.completions.create(**given)
        return self._result(reply, given["model"])

    def stream(self, request: ChatRequest, tell: Tell) -> ChatResult:
        """Answer as ``chat`` does, by server-sent events. A stream without a finish reason has broken off."""
        given = self._parameters(request)
        answer = StreamedAnswer()
        with self._connection.errors_mapped():
            events = self._connection.client.chat.completions.create(
                **given, stream=True, stream_options={"include_usage": True}
            )
        with events:
            chunks = iter(events)
            # Only what the SDK does is under its errors: those of ``tell`` are its caller's.
            while (chunk := self._next(chunks)) is not None:
                if text := answer.add(chunk):
                    tell(text)
        if not answer.has_begun:
            kind = events.response.headers.get("content-type", "untyped")
            raise self._connection.error(f"the reply is no stream of a chat completion, but {kind}")
        if not answer.finish_reason:
            raise self._connection.error("the reply broke off", ProviderUnavailable)
        return ChatResult(
            text=answer.text,
            tool_calls=answer.tool_calls(),
            model=answer.model or given["model"],
            usage=answer.usage,
            finish_reason=answer.finish_reason,
            provider=self.name,
        )

    def _next(self, chunks: Iterator[Any]) -> Any:
        with self._connection.errors_mapped():
            return next(chunks, None)

    def _parameters(self, request: ChatRequest) -> dict[str, Any]:
        given = request.model_dump(
            include={"messages", "temperature", "max_tokens", "stop", "tools", "response_format"}, exclude_none=True
        )
        given["model"] = self.endpoint.model_for(request.model)
        return {**given, "extra_body": request.extra, "extra_headers": self._connection.headers()}

    # Any: the SDK does not validate, so its types promise more than servers keep. A wrong path may bring a web
    # page, and some gateways report errors under status 200.
    def _result(self, reply: Any, asked: str) -> ChatResult:
        choice = next(iter(getattr(reply, "choices", None) or ()), None)
        message = getattr(choice, "message", None)
        if choice is None or message is None:
            raise self._connection.error(f"the reply is no chat completion: {excerpt(reply)}")
        return ChatResult(
            text=message.content or message.refusal or "",
            tool_calls=[call.model_dump(mode="json", exclude_unset=True) for call in message.tool_calls or ()],
            model=reply.model or asked,
            usage=_usage(reply),
            finish_reason=choice.finish_reason or "stop",
            provider=self.name,
        )

    def close(self) -> None:
        """Close this process's connections. Safe to repeat."""
        self._connection.close()


class StreamedAnswer:
    """An answer that comes in pieces: of several choices the first.

    The SDK has a helper for this, which takes for granted that servers keep to the letter of the API, as for the index
    of a tool call, and adds to tool calls what the API does not know.
    """

    def __init__(self) -> None:
        self.finish_reason, self.model, self.usage = "", "", Usage()
        self.has_begun = False
        self._texts: list[str] = []
        self._calls: dict[Any, dict[str, Any]] = {}

    @property
    def text(self) -> str:
        """What was said so far."""
        return "".join(self._texts)

    def add(self, chunk: Any) -> str:
        """Take the next piece; return the text that it brings, maybe empty."""
        self.model = getattr(chunk, "model", None) or self.model
        # It comes with the last piece; some servers send it with each.
        if getattr(chunk, "usage", None):
            self.usage = _usage(chunk)
        choice = next((one for one in getattr(chunk, "choices", None) or () if not one.index), None)
        if choice is None:
            return ""
        self.has_begun = True
        self.finish_reason = choice.finish_reason or self.finish_reason
        if (delta := choice.delta) is None:
            return ""
        for call in delta.tool_calls or ():
            self._add_call(call.model_dump(mode="json", exclude_unset=True))
        text: str = delta.content or getattr(delta, "refusal", None) or ""
        if text:
            self._texts.append(text)
        return text

    def tool_calls(self) -> list[dict[str, Any]]:
        """The calls so far, as in an answer that comes whole."""
        return list(self._calls.values())

    def _add_call(self, piece: dict[str, Any]) -> None:
        # Servers that send each call whole may leave out its index.
        index = piece.pop("index", None)
        key = index if index is not None else piece.get("id") or len(self._calls)
        call = self._calls.setdefault(key, {})
        function = piece.pop("function", None) or {}
        call.update({name: value for name, value in piece.items() if value is not None})
        if function:
            so_far = call.setdefault("function", {"name": "", "arguments": ""})
            so_far["name"] += function.get("name") or ""
            so_far["arguments"] += function.get("arguments") or ""


class OpenAIEmbeddings:
    """Embedding models behind an OpenAI-compatible URL."""

    name = "openai"

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._connection = Connection(endpoint)

    def embed(self, request: EmbeddingRequest) -> EmbeddingResult:
        """Embed all texts in one request. Raises as ``ChatProvider.chat`` does."""
        model = self.endpoint.model_for(request.model)
        with self._connection.errors_mapped():
            reply = self._connection.client.embeddings.create(
                input=list(request.texts), model=model, extra_headers=self._connection.headers()
            )
        return self._result(reply, model, len(request.texts))

    def _result(self, reply: Any, asked: str, count: int) -> EmbeddingResult:
        rows = getattr(reply, "data", None) or ()
        if len(rows) != count:
            raise self._connection.error(f"{count} texts brought {len(rows)} vectors: {excerpt(reply)}")
        with self._connection.errors_mapped():
            # Validation makes the array, and refuses rows of different lengths.
            return EmbeddingResult.model_validate(
                {
                    "vectors": [row.embedding for row in sorted(rows, key=lambda row: row.index)],
                    "model": reply.model or asked,
                    "usage": _usage(reply),
                    "provider": self.name,
                }
            )

    def close(self) -> None:
        """Close this process's connections. Safe to repeat."""
        self._connection.close()


def _kind_of(status: int) -> type[ProviderError]:
    passing = status in PASSING_STATUSES or status >= 500
    return ProviderUnavailable if passing else ProviderError


def _usage(reply: Any) -> Usage:
    return Usage(**{name: getattr(reply.usage, name, None) or 0 for name in Usage.model_fields})


def excerpt(reply: object) -> str:
    """The beginning of a reply, for an error."""
    text = reply if isinstance(reply, str) else repr(reply)
    return text if len(text) <= 200 else f"{text[:200]}…"
