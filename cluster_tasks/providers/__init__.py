"""Backends of language models and embeddings: any OpenAI-compatible URL, or local ones that need no server."""

from __future__ import annotations

from pydantic import SecretStr

from cluster_tasks.errors import ConfigurationError
from cluster_tasks.providers.base import (
    ChatProvider,
    ChatRequest,
    ChatResult,
    EmbeddingProvider,
    EmbeddingRequest,
    EmbeddingResult,
    Usage,
)
from cluster_tasks.providers.local import ExtractiveChat, HashEmbeddings
from cluster_tasks.providers.openai import Endpoint, OpenAIChat, OpenAIEmbeddings
from cluster_tasks.settings import ClusterSettings

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
    "OpenAIChat",
    "OpenAIEmbeddings",
    "Usage",
    "chat_provider",
    "embedding_provider",
]


def chat_provider(settings: ClusterSettings) -> ChatProvider:
    """The provider of ``llm_base_url``, else ``local-extractive``. No I/O.

    Raises ConfigurationError for a URL or key that cannot work, and for a model or key without a URL.
    """
    if settings.llm_base_url is None:
        _check_no_url("LLM", settings.llm_model, settings.llm_api_key, ExtractiveChat.name)
        return ExtractiveChat()
    return OpenAIChat(
        Endpoint(
            "LLM",
            settings.llm_base_url,
            model=settings.llm_model,
            api_key=settings.llm_api_key,
            timeout_s=settings.llm_timeout_s,
            max_retries=settings.provider_max_retries,
        )
    )


def embedding_provider(settings: ClusterSettings) -> EmbeddingProvider:
    """The provider of ``embedding_base_url``, else ``local-hash``. Raises as ``chat_provider`` does."""
    if settings.embedding_base_url is None:
        _check_no_url("EMBEDDING", settings.embedding_model, settings.embedding_api_key, HashEmbeddings.name)
        return HashEmbeddings()
    return OpenAIEmbeddings(
        Endpoint(
            "EMBEDDING",
            settings.embedding_base_url,
            model=settings.embedding_model,
            api_key=settings.embedding_api_key,
            timeout_s=settings.embedding_timeout_s,
            max_retries=settings.provider_max_retries,
        )
    )


def _check_no_url(purpose: str, model: str | None, api_key: SecretStr | None, local: str) -> None:
    # Whoever names a model or a key means a server: a local answer in its place would go unnoticed.
    if api_key or model not in (None, local):
        given = "API_KEY" if api_key else "MODEL"
        raise ConfigurationError(
            f"CLUSTER_{purpose}_{given} is set but CLUSTER_{purpose}_BASE_URL is not: without it there is only {local}"
        )
