"""The apps that ``benchmarks.llm`` compares: ``celery -A benchmarks.chatting worker``, with the variables below.

In the cluster it is the ready-made ``llm.generate``. The stock app does the same with the same SDK, the same time-outs
and as many repeats.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

# Before the pool forks: its processes need not import it one by one.
import openai
from celery import Celery, signals

from benchmarks.sleeping import CLUSTER, REDIS_URL, VARIANT, tell_ready
from cluster_tasks import Cluster
from cluster_tasks.settings import ClusterSettings
from cluster_tasks.tasks import llm

LLM_URL = "BENCHMARK_LLM_URL"
"""Of the server of a stock worker; a node has its ``CLUSTER_LLM_BASE_URL``."""
TIMEOUT_S = 4.0
MODEL = "benchmark"
CHAT, GENERATE = "chat", llm.generate.name
"""The task of either app."""


def make_app(variant: str, url: str) -> Celery:
    """Return an app that can chat."""
    app = Celery("chatting", broker=url, backend=url, set_as_current=False)
    if variant == CLUSTER:
        Cluster(app)
        return app
    app.conf.update(task_acks_late=True, task_reject_on_worker_lost=True, worker_prefetch_multiplier=1)

    @app.task(name=CHAT, shared=False)
    def chat(messages: list[dict[str, Any]], session_id: str, user: str) -> dict[str, Any]:
        """Ask the server of this worker."""
        reply = _client().chat.completions.create(model=MODEL, messages=messages, user=user)  # type: ignore[arg-type]
        return {"text": reply.choices[0].message.content}

    return app


@cache
def _client() -> openai.OpenAI:
    retries = ClusterSettings.model_fields["provider_max_retries"].default
    return openai.OpenAI(base_url=os.environ[LLM_URL], api_key="none", timeout=TIMEOUT_S, max_retries=retries)


if REDIS_URL in os.environ:
    app = make_app(os.environ[VARIANT], os.environ[REDIS_URL])
    signals.worker_ready.connect(lambda **_: tell_ready(os.environ[REDIS_URL]), weak=False)
