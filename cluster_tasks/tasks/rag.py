"""``rag.answer``: a question is answered from a collection, in three jobs of which none waits for another.

``embedding.embed`` → ``rag.search`` → ``rag.generate``: each gets the result of the one before as first argument, and
goes to the node that its own request type prefers. A search for words alone embeds nothing, and is two jobs. Where the
shards lie on several nodes, ``rag.search`` is replaced by a job on each and their merge; that one then reranks.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from celery import chain
from celery.exceptions import TaskRevokedError

from cluster_tasks.shards.documents import Mode
from cluster_tasks.tasks.arguments import AnswerArguments, CacheUse, Rerank
from cluster_tasks.tasks.base import ClusterTask, expiry
from cluster_tasks.tasks.embedding import EMBED
from cluster_tasks.tasks.fanout import asking, best_node, search_here, search_nodes, shares_for
from cluster_tasks.tasks.llm import conversation
from cluster_tasks.tasks.queries import fitting
from cluster_tasks.tasks.ready_made import ready_made
from cluster_tasks.tasks.reranking import Reranking, reranking_of
from cluster_tasks.tasks.retrieval import mode_of

NO_PASSAGES = "no_passages"
"""The finish reason of an answer for which nothing was found."""


@ready_made("rag.answer", request_type="retrieval", affinity="collection", arguments=AnswerArguments)
def answer(
    task: ClusterTask,
    question: str,
    collection: str,
    k: int = 5,
    where: dict[str, Any] | None = None,
    model: str | None = None,
    temperature: float | None = None,
    max_tokens: int | None = None,
    stop: str | list[str] | None = None,
    response_format: dict[str, Any] | None = None,
    session_id: str | None = None,
    allow_degraded: bool = True,
    mode: Mode | None = None,
    cache: CacheUse = None,
    rerank: Rerank = None,
    candidates: int | None = None,
    **extra: Any,
) -> dict[str, Any]:
    """Answer a question from the ``k`` passages of a collection that fit it best among those that match ``where``.

    Returns what ``llm.generate`` returns and ``passages``, those that the model was given, as ``retrieval.search``
    returns them. If nothing matches, the model is not asked: ``text`` is empty and ``finish_reason`` is
    ``no_passages``. Fails as the jobs it is made of do, and with TaskRevokedError if it expires between them. ``cache``
    and ``allow_degraded`` are theirs, too, and ``mode``, ``rerank`` and ``candidates`` those of the search: ``"text"``
    embeds nothing.

    ``citations`` lists the passages that the answer cites, in the order in which it does: ``number`` (from 1, in
    ``passages``), ``id``, ``document`` (the id of the document), its ``heading``, ``page`` and ``start`` there, None
    where they are not known, and ``spans``, the sentences of the answer that cite it, each from ``start`` to ``end``
    in ``text``. The sentences of ``local-extractive`` are passages word by word: their spans say where, by
    ``passage_start`` and ``passage_end``; those of other answers are told by their markers, as in [1]. Numbers that no
    passage has are ``unknown_citations``. An answer with a ``response_format`` other than text has neither: brackets
    mean something else in it.
    """
    sampling = {
        "model": model,
        "temperature": temperature,
        "max_tokens": max_tokens,
        "stop": stop,
        "response_format": response_format,
        "session_id": session_id,
        "allow_degraded": allow_degraded,
        "cache": cache,
        **extra,
    }
    steps = task.app.tasks
    asked = (collection, k, where, question, mode_of(mode, question))
    reranking = reranking_of(rerank, candidates, k, allow_degraded)
    # Not as option of the steps: Celery ends no chain of which one expires.
    deadline = expiry(task.request.expires)
    until = {} if deadline is None else {"deadline": deadline}
    options = {"rerank": reranking} if reranking else {}
    if mode == "text":
        finding = [steps["rag.search"].s(None, *asked, **options, **until)]
    else:
        finding = [steps[EMBED].s(question, cache=cache), steps["rag.search"].s(*asked, **options, **until)]
    replaced: dict[str, Any] = task.replace(chain(*finding, steps["rag.generate"].s(question, **sampling, **until)))
    return replaced


@ready_made("rag.search", request_type="retrieval", affinity="collection", prefers=best_node)
def search_step(
    task: ClusterTask,
    embedded: Mapping[str, Any] | None,
    collection: str,
    k: int,
    where: dict[str, Any] | None,
    question: str | None = None,
    mode: Mode = "vector",
    rerank: Reranking | None = None,
    deadline: float | None = None,
) -> dict[str, Any]:
    """Search for a question with the vector that ``embedding.embed`` returned, or without, and rerank what is found."""
    _check_deadline(deadline)
    vector, model = None, None
    if embedded is not None:
        vector, model = embedded["vectors"][0], embedded["model"]
        if question is not None:
            # What a node of older code embedded does not say whether it was kept.
            cached = embedded.get("cached", False)
            vector, model = fitting(task.app, collection, question, vector, model, cached=cached)
    asked = asking(collection, k, where, mode, question, vector, model, rerank)
    if (shares := shares_for(task, collection, k)) is not None:
        return search_nodes(task, shares, asked, deadline=deadline)
    return search_here(task.app, asked)


def _check_deadline(deadline: float | None) -> None:
    if deadline is not None and time.time() > deadline:
        raise TaskRevokedError("expired")


def _conversation(question: str, session_id: str | None = None, **_: Any) -> str:
    return conversation(question, session_id=session_id)


@ready_made("rag.generate", request_type="llm", affinity=_conversation)
def generate_step(
    task: ClusterTask,
    found: Mapping[str, Any],
    question: str,
    model: str | None = None,
    session_id: str | None = None,
    deadline: float | None = None,
    **sampling: Any,
) -> dict[str, Any]:
    """Answer from the passages that ``rag.search`` returned."""
    _check_deadline(deadline)
    from cluster_tasks.providers import ChatResult
    from cluster_tasks.tasks.citing import cited

    searched = {key: found[key] for key in ("passages", "rerank") if key in found}
    passages = found["passages"]
    if not passages:
        nothing = ChatResult(text="", model=model or "", finish_reason=NO_PASSAGES, provider="")
        return {**nothing.model_dump(mode="json"), **searched, "citations": [], "unknown_citations": []}
    texts = [passage["text"] for passage in passages]
    # The job itself, run here and now.
    generate = task.app.tasks["llm.generate"]
    with task.streaming():
        generated = generate(question, passages=texts, model=model, session_id=session_id, **sampling)
    return {**generated, **searched, **cited(generated, passages, sampling.get("response_format"))}
