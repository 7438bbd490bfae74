"""Backends of language models, embeddings and rankings: any compatible URL, or local ones that need no server."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from pydantic import SecretStr

from cluster_tasks.addresses.secret import SecretUrl
from cluster_tasks.errors import ConfigurationError, did_you_mean
from cluster_tasks.providers.base import (
    ChatProvider,
    ChatRequest,
    ChatResult,
    EmbeddingProvider,
    EmbeddingRequest,
    EmbeddingResult,
    Quote,
    Rank,
    RerankProvider,
    RerankRequest,
    RerankResult,
    Tell,
    Usage,
)
from cluster_tasks.providers.local import ExtractiveChat, HashEmbeddings, MarginalRelevance
from cluster_tasks.providers.openai import Endpoint, OpenAIChat, OpenAIEmbeddings, Purpose
from cluster_tasks.providers.rerank import HttpReranker
from cluster_tasks.providers.static import StaticEmbeddings
from cluster_tasks.settings import ClusterSettings, Fallback

__all__ = [
    "ChatProvider",
    "ChatRequest",
    "ChatResult",
    "EmbeddingProvider",
    "EmbeddingRequest",
    "EmbeddingResult",
    "Endpoint",
    "ExtractiveChat",
    "HashEmbeddings",
    "HttpReranker",
    "MarginalRelevance",
    "OpenAIChat",
    "OpenAIEmbeddings",
    "Quote",
    "Rank",
    "RerankProvider",
    "RerankRequest",
    "RerankResult",
    "StaticEmbeddings",
    "Tell",
    "Usage",
    "chat_fallbacks",
    "chat_provider",
    "embedding_fallbacks",
    "embedding_provider",
    "rerank_fallbacks",
    "rerank_provider",
]

_LOCAL_EMBEDDINGS: dict[str, Callable[[], EmbeddingProvider]] = {
    HashEmbeddings.name: HashEmbeddings,
    StaticEmbeddings.name: StaticEmbeddings,
}


def chat_provider(settings: ClusterSettings) -> ChatProvider:
    """The provider of ``llm_base_url``, else ``local-extractive``. No I/O.

    Raises ConfigurationError for a URL or key that cannot work, and for a model or key without a URL.
    """
    if settings.llm_base_url is None:
        _check_no_url("LLM", settings.llm_model, settings.llm_api_key, ExtractiveChat.name)
        return ExtractiveChat()
    return OpenAIChat(_first_endpoint(settings, "LLM", settings.llm_base_url))


def chat_fallbacks(settings: ClusterSettings) -> list[OpenAIChat]:
    """The providers of ``llm_fallbacks``, in their order. Raises ConfigurationError for a URL or key."""
    return [OpenAIChat(_endpoint_of(fallback, settings, "LLM")) for fallback in settings.llm_fallbacks]


def embedding_provider(settings: ClusterSettings) -> EmbeddingProvider:
    """The provider of ``embedding_base_url``, else the local one of ``embedding_model``, else ``local-hash``.

    Raises as ``chat_provider`` does, and ConfigurationError if the package of ``local-static`` is not installed.
    """
    if settings.embedding_base_url is None:
        _check_no_url("EMBEDDING", settings.embedding_model, settings.embedding_api_key, *_LOCAL_EMBEDDINGS)
        return _LOCAL_EMBEDDINGS[settings.embedding_model or HashEmbeddings.name]()
    return OpenAIEmbeddings(_first_endpoint(settings, "EMBEDDING", settings.embedding_base_url))


def embedding_fallbacks(settings: ClusterSettings) -> list[OpenAIEmbeddings]:
    """The providers of ``embedding_fallbacks``. Raises as ``chat_fallbacks`` does."""
    return [OpenAIEmbeddings(_endpoint_of(each, settings, "EMBEDDING")) for each in settings.embedding_fallbacks]


def rerank_provider(settings: ClusterSettings) -> RerankProvider:
    """The provider of ``rerank_base_url``, else ``local-mmr``. Raises as ``chat_provider`` does."""
    if settings.rerank_base_url is None:
        _check_no_url("RERANK", settings.rerank_model, settings.rerank_api_key, MarginalRelevance.name)
        return MarginalRelevance()
    return HttpReranker(_first_endpoint(settings, "RERANK", settings.rerank_base_url))


def rerank_fallbacks(settings: ClusterSettings) -> list[HttpReranker]:
    """The providers of ``rerank_fallbacks``. Raises as ``chat_fallbacks`` does."""
    return [HttpReranker(_endpoint_of(each, settings, "RERANK")) for each in settings.rerank_fallbacks]


def _first_endpoint(settings: ClusterSettings, purpose: Purpose, base_url: SecretUrl) -> Endpoint:
    prefix = purpose.lower()
    return Endpoint(
        purpose,
        base_url,
        model=getattr(settings, f"{prefix}_model"),
        api_key=getattr(settings, f"{prefix}_api_key"),
        timeout_s=getattr(settings, f"{prefix}_timeout_s"),
        max_retries=settings.provider_max_retries,
    )


def _endpoint_of(fallback: Fallback, settings: ClusterSettings, purpose: Purpose) -> Endpoint:
    first_url = getattr(settings, f"{purpose.lower()}_base_url")
    first = _first_endpoint(settings, purpose, fallback.base_url or first_url)
    # The key of one provider is none of another's business.
    inherited = None if fallback.base_url else first.api_key
    return replace(first, model=fallback.model or first.model, api_key=fallback.api_key or inherited)


def _check_no_url(purpose: str, model: str | None, api_key: SecretStr | None, *local: str) -> None:
    # Whoever names a model or a key means a server: a local answer in its place would go unnoticed.
    if api_key or model not in (None, *local):
        given = "API_KEY" if api_key else "MODEL"
        hint = "" if api_key or model is None else did_you_mean(model, local)
        raise ConfigurationError(
            f"CLUSTER_{purpose}_{given} is set but CLUSTER_{purpose}_BASE_URL is not: without it there is only "
            f"{' or '.join(local)}{hint}"
        )
