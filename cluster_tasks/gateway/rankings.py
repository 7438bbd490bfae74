"""Who ranks what a search found: a model, the next one, else the search itself."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from cluster_tasks.gateway.fallbacks import CHARACTERS_A_TOKEN, first_available, guards_of
from cluster_tasks.gateway.guard import Guard, Neighbourhood
from cluster_tasks.providers import (
    HttpReranker,
    MarginalRelevance,
    Rank,
    RerankProvider,
    RerankRequest,
    RerankResult,
    rerank_fallbacks,
    rerank_provider,
)
from cluster_tasks.settings import ClusterSettings

LOCAL = ("local", MarginalRelevance.name)
"""Named as a model, these need none."""


class GuardedReranker:
    """A reranking model behind its guard."""

    def __init__(self, provider: HttpReranker, guard: Guard) -> None:
        self.name, self._provider, self._guard = provider.name, provider, guard

    def rerank(self, request: RerankRequest) -> RerankResult:
        """As ``RerankProvider.rerank``. Raises CircuitOpen and ProviderLimited, too."""
        # A model reads the query with each text.
        characters = sum(map(len, request.texts)) + len(request.texts) * len(request.query)
        return self._guard.send(
            lambda: self._provider.rerank(request), characters // CHARACTERS_A_TOKEN + 1,
            lambda reply: reply.usage.total_tokens,
        )  # fmt: skip

    def close(self) -> None:
        """Close this process's connections. Safe to repeat."""
        self._provider.close()


class AsFound:
    """The last resort: the order of the search, which nobody has judged anew."""

    name = "search"

    def rerank(self, request: RerankRequest) -> RerankResult:
        """Return the first texts."""
        ranking = [Rank(index=index) for index in range(min(request.top, len(request.texts)))]
        return RerankResult(ranking=ranking, model="", provider=self.name)

    def close(self) -> None:
        """Do nothing: there is nothing to release."""


class RerankGateway:
    """Reranking models in the order in which they are asked, and what stands in for all of them."""

    def __init__(self, models: Sequence[RerankProvider], stand_ins: Sequence[RerankProvider] = ()) -> None:
        self._models, self._stand_ins = models, stand_ins
        self._local = MarginalRelevance()

    def rerank(self, request: RerankRequest, allow_degraded: bool = True) -> RerankResult:
        """Rank as ``first_available`` says, with models as ``ChatGateway.chat``; one of LOCAL is asked alone."""
        handed_on = request.model_copy(update={"model": None})
        if request.model in LOCAL:
            return self._local.rerank(handed_on)
        first, *others = self._models
        models = [partial(first.rerank, request), *(partial(other.rerank, handed_on) for other in others)]
        stand_ins = [partial(stand_in.rerank, handed_on) for stand_in in self._stand_ins]
        return first_available(models, stand_ins, allow_degraded)

    def close(self) -> None:
        """Close this process's connections. Safe to repeat."""
        for provider in (*self._models, *self._stand_ins):
            provider.close()


def rerank_gateway(settings: ClusterSettings, around: Neighbourhood) -> RerankGateway:
    """The reranking models of the settings. Raises ConfigurationError as ``rerank_provider`` does. No I/O."""
    first = rerank_provider(settings)
    if not isinstance(first, HttpReranker):
        return RerankGateway([first])
    providers = [first, *rerank_fallbacks(settings)]
    guards = guards_of(settings, around, [provider.endpoint for provider in providers], settings.rerank_fallbacks)
    return RerankGateway(list(map(GuardedReranker, providers, guards)), [AsFound()])
