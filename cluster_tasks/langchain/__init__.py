"""LangChain on the cluster: what it asks of models and collections is done by jobs. See ``docs/langchain.md``.

Whatever fails as its job does raises what ``get()`` of that job's result raises; with asyncio no thread is blocked.
Importing this raises ConfigurationError if LangChain is not installed.
"""

from __future__ import annotations

from cluster_tasks.errors import ConfigurationError

try:
    import langchain_core  # noqa: F401 - only whether it is there
except ImportError as exc:
    raise ConfigurationError("cluster_tasks.langchain needs LangChain: pip install 'cluster-tasks[langchain]'") from exc

from cluster_tasks.langchain.cache import ClusterCache
from cluster_tasks.langchain.chat_model import ChatCluster
from cluster_tasks.langchain.embeddings import ClusterEmbeddings
from cluster_tasks.langchain.retrieval import ClusterRetriever, ClusterVectorStore

__all__ = ["ChatCluster", "ClusterCache", "ClusterEmbeddings", "ClusterRetriever", "ClusterVectorStore"]
