"""Who answers when the first provider does not: the next one, then what needs no model, each marked as such."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, TypeVar

from cluster_tasks.breaker import BreakerPolicy
from cluster_tasks.errors import CircuitOpen, ProviderError, ProviderLimited, ProviderUnavailable
from cluster_tasks.gateway.guard import Guard, Neighbourhood
from cluster_tasks.gateway.shared import Limits
from cluster_tasks.providers import (
    ChatProvider,
    ChatRequest,
    ChatResult,
    EmbeddingProvider,
    EmbeddingRequest,
    EmbeddingResult,
    Endpoint,
    ExtractiveChat,
    OpenAIChat,
    OpenAIEmbeddings,
    Tell,
    chat_fallbacks,
    chat_provider,
    embedding_fallbacks,
    embedding_provider,
)
from cluster_tasks.providers.base import Answer
from cluster_tasks.providers.local import text_of
from cluster_tasks.settings import ClusterSettings, Fallback

CHARACTERS_A_TOKEN = 4
ANSWER_TOKENS = 256
"""What an answer is taken to need, where the request sets no limit; the reply corrects it."""
SHORTEST_WINDOW_S = 300.0
Stored = Callable[[], ChatResult | None]
A = TypeVar("A", bound=Answer)


class Listener(Protocol):
    """Is told an answer while it is made."""

    def begin(self) -> None:
        """Another provider is asked: what was told so far is no part of the answer."""

    def write(self, piece: str) -> None:
        """Take the next piece. What it raises ends the request, and no other provider is asked."""


class GuardedChat:
    """A language model behind its guard."""

    def __init__(self, provider: OpenAIChat, guard: Guard) -> None:
        self.name, self._provider, self._guard = provider.name, provider, guard

    def chat(self, request: ChatRequest) -> ChatResult:
        """As ``ChatProvider.chat``. Raises CircuitOpen and ProviderLimited, too."""
        return self._guard.send(
            lambda: self._provider.chat(request), chat_tokens(request), lambda reply: reply.usage.total_tokens
        )

    def stream(self, request: ChatRequest, tell: Tell) -> ChatResult:
        """As ``ChatProvider.stream``. Raises CircuitOpen and ProviderLimited, too."""
        return self._guard.send(
            lambda: self._provider.stream(request, tell), chat_tokens(request), lambda reply: reply.usage.total_tokens
        )

    def close(self) -> None:
        """Close this process's connections. Safe to repeat."""
        self._provider.close()


class GuardedEmbeddings:
    """An embedding model behind its guard."""

    def __init__(self, provider: OpenAIEmbeddings, guard: Guard) -> None:
        self.name, self._provider, self._guard = provider.name, provider, guard

    def embed(self, request: EmbeddingRequest) -> EmbeddingResult:
        """As ``EmbeddingProvider.embed``. Raises CircuitOpen and ProviderLimited, too."""
        tokens = sum(map(len, request.texts)) // CHARACTERS_A_TOKEN + 1
        return self._guard.send(lambda: self._provider.embed(request), tokens, lambda reply: reply.usage.total_tokens)

    def close(self) -> None:
        """Close this process's connections. Safe to repeat."""
        self._provider.close()


class FromPassages:
    """The last resort: sentences of the passages. What has none is handed on."""

    name = ExtractiveChat.name

    def __init__(self) -> None:
        self._extractive = ExtractiveChat()

    def chat(self, request: ChatRequest) -> ChatResult:
        """Answer from the passages. Raises ProviderUnavailable for what only a language model can answer."""
        self._check(request)
        return self._extractive.chat(request)

    def stream(self, request: ChatRequest, tell: Tell) -> ChatResult:
        """Answer as ``chat`` does, and tell one sentence after the other."""
        self._check(request)
        return self._extractive.stream(request, tell)

    @staticmethod
    def _check(request: ChatRequest) -> None:
        if not request.passages or request.tools or request.response_format:
            raise ProviderUnavailable("only a language model can answer this")

    def close(self) -> None:
        """Do nothing: there is nothing to release."""


class ChatGateway:
    """Language models in the order in which they are asked, and stand-ins for all of them."""

    def __init__(self, models: Sequence[ChatProvider], stand_ins: Sequence[ChatProvider] = ()) -> None:
        self._models, self._stand_ins = models, stand_ins

    def chat(
        self, request: ChatRequest, allow_degraded: bool = True, stored: Stored = lambda: None,
        listener: Listener | None = None,
    ) -> ChatResult:  # fmt: skip
        """Answer as ``first_available`` says.

        ``stored`` returns what was answered before, or None, and is asked after all models. ``listener`` is told what
        the providers say, each from the beginning.
        A model that the request names is that of the first provider; the others answer with their own.
        """
        first, *others = self._models
        handed_on = request.model_copy(update={"model": None})
        models = [
            partial(_ask, first, request, listener),
            *(partial(_ask, each, handed_on, listener) for each in others),
        ]
        stand_ins = (partial(_ask, stand_in, handed_on, listener) for stand_in in self._stand_ins)
        return first_available(models, [stored, *stand_ins], allow_degraded)

    def close(self) -> None:
        """Close this process's connections. Safe to repeat."""
        for provider in (*self._models, *self._stand_ins):
            provider.close()


class EmbeddingGateway:
    """Several places of one embedding model."""

    name = "gateway"

    def __init__(self, places: Sequence[EmbeddingProvider]) -> None:
        self._places = places

    def embed(self, request: EmbeddingRequest) -> EmbeddingResult:
        """Embed by the first place that is available. Raises what the first raised, but rather ProviderLimited.

        What the first refuses is not asked of the others; one of those that refuses is passed over.
        """
        errors: list[ProviderError] = []
        for place in self._places:
            try:
                return place.embed(request)
            except ProviderError as exc:
                if not errors and not isinstance(exc, ProviderUnavailable):
                    raise
                errors.append(exc)
        raise next((error for error in errors if isinstance(error, ProviderLimited)), errors[0])

    def close(self) -> None:
        """Close this process's connections. Safe to repeat."""
        for place in self._places:
            place.close()


def chat_gateway(settings: ClusterSettings, around: Neighbourhood) -> ChatGateway:
    """The language models of the settings. Raises ConfigurationError as ``chat_provider`` does. No I/O."""
    first = chat_provider(settings)
    if not isinstance(first, OpenAIChat):
        return ChatGateway([first])
    providers = [first, *chat_fallbacks(settings)]
    guards = guards_of(settings, around, [provider.endpoint for provider in providers], settings.llm_fallbacks)
    return ChatGateway(list(map(GuardedChat, providers, guards)), [FromPassages()])


def embedding_gateway(settings: ClusterSettings, around: Neighbourhood) -> EmbeddingProvider:
    """The embedding model of the settings. Raises ConfigurationError as ``embedding_provider`` does. No I/O."""
    first = embedding_provider(settings)
    if not isinstance(first, OpenAIEmbeddings):
        return first
    providers = [first, *embedding_fallbacks(settings)]
    guards = guards_of(settings, around, [provider.endpoint for provider in providers], settings.embedding_fallbacks)
    return EmbeddingGateway(list(map(GuardedEmbeddings, providers, guards)))


def chat_tokens(request: ChatRequest) -> int:
    """About how many tokens a request takes, with its answer."""
    characters = sum(len(text_of(message)) for message in request.messages)
    characters += len(json.dumps([request.tools, request.response_format]))
    return characters // CHARACTERS_A_TOKEN + (request.max_tokens or ANSWER_TOKENS)


def _ask(provider: ChatProvider, request: ChatRequest, listener: Listener | None) -> ChatResult:
    if listener is None:
        return provider.chat(request)
    listener.begin()
    return provider.stream(request, listener.write)


def first_available(
    models: Sequence[Callable[[], A]], stand_ins: Sequence[Callable[[], A | None]], allow_degraded: bool
) -> A:
    """Return what the first model does; if it is unavailable, what the next does that is not, marked ``degraded``.

    Stand-ins come after all models; None: it has nothing. A provider whose limits are used up is passed over for other
    models, but never for a stand-in: the wait is short. Raises what the first provider raised; ProviderLimited if any
    of them has to be waited for. If ``allow_degraded`` is false, only the first is asked.
    """
    first, *others = models
    try:
        return first()
    except ProviderUnavailable as exc:
        if not allow_degraded:
            raise
        cause = exc
    errors: list[ProviderError] = [cause]
    if result := _first_answer(others, errors):
        return _degraded(result, cause)
    for error in errors:
        if isinstance(error, ProviderLimited):
            raise error
    if result := _first_answer(stand_ins, errors):
        return _degraded(result, cause)
    raise cause


def _first_answer(asked: Sequence[Callable[[], A | None]], errors: list[ProviderError]) -> A | None:
    for ask in asked:
        try:
            if result := ask():
                return result
        except ProviderError as exc:
            errors.append(exc)
    return None


def _degraded(result: A, cause: ProviderUnavailable) -> A:
    reasons = ((CircuitOpen, "circuit_open"), (ProviderLimited, "rate_limited"), (ProviderUnavailable, "unavailable"))
    reason = next(word for kind, word in reasons if isinstance(cause, kind))
    return result.model_copy(update={"degraded": True, "degraded_reason": reason})


def guards_of(
    settings: ClusterSettings, around: Neighbourhood, endpoints: Sequence[Endpoint], fallbacks: Sequence[Fallback]
) -> list[Guard]:
    """What the requests to each endpoint pass: the first is that of the settings, the others are its fallbacks."""
    purpose = endpoints[0].purpose.lower()
    per_minute = (getattr(settings, f"{purpose}_{what}_per_minute") for what in ("requests", "tokens"))
    limits = [Limits(*per_minute), *(Limits(each.requests_per_minute, each.tokens_per_minute) for each in fallbacks)]
    return [_guard(settings, around, endpoint, limit) for endpoint, limit in zip(endpoints, limits, strict=True)]


def _guard(settings: ClusterSettings, around: Neighbourhood, endpoint: Endpoint, limits: Limits) -> Guard:
    failures = settings.breaker_failure_threshold
    # A server that hangs fails after all its time-outs: two such rounds must fit into the window.
    longest_s = endpoint.timeout_s * (endpoint.max_retries + 1)
    policy = BreakerPolicy(
        failure_threshold=failures,
        success_threshold=settings.breaker_success_threshold,
        timeout_s=settings.breaker_timeout_s,
        window=2 * failures,
        window_s=max(SHORTEST_WINDOW_S, 2.5 * longest_s),
        minimum_volume=failures,
        probe_lease_s=endpoint.timeout_s,
    )
    return Guard(around, endpoint.name, policy, limits, settings.provider_wait_s)
