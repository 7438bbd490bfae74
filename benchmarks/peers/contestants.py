"""Who they are: what is installed, how a worker is started, and what becomes of a job whose worker dies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

THREADS, PREFORK = "threads", "prefork"
"""One process with two slots, or two processes with one: the pools of Celery with which a peer is compared."""


@dataclass(frozen=True, slots=True)
class Peer:
    """One task queue."""

    name: str
    requirements: Sequence[str]
    workers: Mapping[str, Sequence[Sequence[str]]]
    """By pool: the commands that are one worker, each the name of a program of the environment and its words."""
    guarantee: str
    reruns: bool = True
    """Whether a job whose worker died is run again, as here."""
    results: str = ""
    """What the keys of results begin with; empty: they cannot be counted so."""
    environ: Mapping[str, str] = field(default_factory=dict)

    @property
    def app(self) -> str:
        """The module that publishes, and that workers import."""
        return f"app_{self.name}"

    @property
    def version(self) -> str:
        """Of the queue itself."""
        return self.requirements[0].partition("==")[2]


_DRAMATIQ = ("dramatiq", "app_dramatiq", "--skip-logging")
_RQ = ("rq", "worker-pool", "--quiet", "--worker-class", "rq.worker.SimpleWorker", "--num-workers", "2")
_TASKIQ = ("taskiq", "worker", "app_taskiq:broker", "--max-async-tasks", "100", "--log-level", "WARNING")
_ARQ = ("arq", "app_arq.WorkerSettings", "--custom-log-dict", "app_arq.QUIET")
_HUEY = ("huey_consumer", "app_huey.huey", "-w", "2", "--no-periodic", "--disable-health-check", "--quiet")

PEERS = (
    Peer(
        name="dramatiq",
        requirements=["dramatiq[redis]==2.2.1", "hiredis==3.5.0"],
        workers={
            THREADS: [[*_DRAMATIQ, "--processes", "1", "--threads", "2"]],
            PREFORK: [[*_DRAMATIQ, "--processes", "2", "--threads", "1"]],
        },
        guarantee="at least once, after a minute",
        environ={"dramatiq_queue_prefetch": "64"},
    ),
    Peer(
        name="rq",
        requirements=["rq==3.0.0", "hiredis==3.5.0"],
        workers={PREFORK: [[*_RQ]]},
        guarantee="at least once, after its time-out",
        results="rq:results:",
    ),
    Peer(
        name="arq",
        requirements=["arq==0.28.0"],
        workers={
            THREADS: [[*_ARQ]],
            PREFORK: [[*_ARQ], [*_ARQ]],
        },
        guarantee="at least once, after its time-out",
        results="arq:result:",
    ),
    Peer(
        name="taskiq",
        requirements=["taskiq[uv]==0.13.0", "taskiq-redis==1.2.4", "hiredis==3.5.0"],
        workers={THREADS: [[*_TASKIQ, "--workers", "1"]], PREFORK: [[*_TASKIQ, "--workers", "2"]]},
        guarantee="at least once, after ten minutes",
    ),
    Peer(
        name="huey",
        requirements=["huey[redis]==3.5.4", "hiredis==3.5.0"],
        workers={THREADS: [[*_HUEY, "-k", "thread"]], PREFORK: [[*_HUEY, "-k", "process"]]},
        guarantee="at most once",
        reruns=False,
    ),
    Peer(
        name="saq",
        # Its package does not say that it needs typing_extensions.
        requirements=["saq[redis]==0.26.4", "hiredis==3.5.0", "typing_extensions==4.16.0"],
        workers={THREADS: [["saq", "app_saq.settings"]], PREFORK: [["saq", "app_saq.settings", "--workers", "2"]]},
        guarantee="at least once, after its time-out",
    ),
)
