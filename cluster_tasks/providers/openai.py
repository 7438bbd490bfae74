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
from cluster_tasks.providers.base import ChatRequest, ChatResult, EmbeddingRequest, EmbeddingResult, Usage

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
            passing = exc.status_code in PASSING_STATUSES or exc.status_code >= 500
            raise self.error(exc.message, ProviderUnavailable if passing else ProviderError) from None
        except openai.APIConnectionError as exc:
            cause = f" {exc.__cause__}" if exc.__cause__ else ""
            raise self.error(f"{exc.message}{cause}", ProviderUnavailable) from None
        except (openai.OpenAIError, ValueError) as exc:
            raise self.error(f"the reply cannot be read: {exc}") from None

    def error(self, detail: str, kind: type[ProviderError] = ProviderError) -> ProviderError:
        """An error that names the endpoint; a key that the provider repeats in its message is masked."""
        if key := self._endpoint.key:
            detail = detail.replace(key, "**")
        return kind(f"{self._endpoint.base_url}: {detail}")

    def close(self) -> None:
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
        given = request.model_dump(
            include={"messages", "temperature", "max_tokens", "stop", "tools", "response_format"}, exclude_none=True
        )
        given["model"] = self.endpoint.model_for(request.model)
        with self._connection.errors_mapped():
            reply = self._connection.client.chat.completions.create(
                **given, extra_body=request.extra, extra_headers=self._connection.headers()
            )
        return self._result(reply, given["model"])

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


def _usage(reply: Any) -> Usage:
    return Usage(**{name: getattr(reply.usage, name, None) or 0 for name in Usage.model_fields})


def excerpt(reply: object) -> str:
    """The beginning of a reply, for an error."""
    text = reply if isinstance(reply, str) else repr(reply)
    return text if len(text) <= 200 else f"{text[:200]}…"
