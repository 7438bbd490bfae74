"""The app of these tests: one task for each thing that a Celery task can do."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping
from typing import Any

from celery import Celery, signals
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded
from celery.states import FAILURE
from kombu.serialization import register

from cluster_tasks import Cluster, ClusterTask

SHOUT = "application/x-shout"
TICK_S = 0.2
CRASHES_ALLOWED = 8
"""A job that kills its process gives up after so many times, so that a test can fail and end."""

# A serializer of the user's own, on both sides of the broker.
register("shout", lambda data: json.dumps(data).swapcase(), lambda text: json.loads(text.swapcase()), SHOUT, "utf-8")


def make_app(broker: str | None = None) -> Celery:
    """Return a new app; workers make one when they import this module, each test module makes its own."""
    app = Celery("features", broker=broker, set_as_current=False)
    app.conf.update(
        accept_content=["json", SHOUT],
        beat_schedule={"tick": {"task": "features.note", "schedule": TICK_S, "args": ("tock", "tick")}},
        worker_send_task_events=True,
    )
    cluster = Cluster(app)
    _values(app)
    _notes(app, cluster)
    _errors(app, cluster)
    _limits(app, cluster)
    return app


def note(cluster: Cluster, key: str, value: Any) -> int:
    """Append to a list in Redis beside the cluster's keys; return its new length."""
    length: Any = cluster.client.rpush(f"test:{key}", json.dumps(value))
    return int(length)


def _task(app: Celery, **options: Any) -> Any:
    def decorate(function: Any) -> Any:
        name = f"features.{function.__name__}"
        return app.task(**{"base": ClusterTask, "request_type": "feature", "name": name, "shared": False, **options})(
            function
        )

    return decorate


def _values(app: Celery) -> None:
    """Tasks that return something."""

    @_task(app)
    def echo(value: Any) -> Any:
        return value

    @_task(app)
    def add(x: int, y: int) -> int:
        return x + y

    @_task(app)
    def total(numbers: list[int]) -> int:
        return sum(numbers)

    @app.task(name="features.plain_add", shared=False)
    def plain_add(x: int, y: int) -> int:
        """None of the cluster's tasks."""
        return x + y

    @_task(app, bind=True)
    def become(self: Any, signature: Mapping[str, Any]) -> Any:
        """Let another signature take this job's place."""
        raise self.replace(app.signature(signature))

    @_task(app, bind=True)
    def send_two(self: Any) -> str:
        """Send two jobs, which become its children."""
        return ",".join(app.tasks["features.echo"].delay(number).id for number in range(2))

    @_task(app, bind=True)
    def enlarge_chord(self: Any, number: int) -> int:
        """Add one more job to the chord that this one is part of."""
        self.add_to_chord(app.tasks["features.add"].si(number, 100))
        return number

    @_task(app, bind=True)
    def describe(self: Any, *args: Any) -> dict[str, Any]:
        """Return what a job knows of itself."""
        request, stamped = self.request, self.request.stamped_headers or ()
        return {
            "id": request.id, "args": list(args), "root_id": request.root_id, "parent_id": request.parent_id,
            "group": request.group, "headers": request.headers or {}, "hostname": request.hostname,
            "priority": request.delivery_info.get("priority"), "timelimit": request.timelimit,
            "stamps": {name: request.stamps[name] for name in stamped}, "pid": os.getpid(),
            "expires": request.expires, "retries": request.retries, "correlation_id": request.correlation_id,
        }  # fmt: skip


def _notes(app: Celery, cluster: Cluster) -> None:
    """Tasks that leave a trace, so that tests can count how often they ran, and in which order."""

    @_task(app, name="features.note")
    def note_value(value: Any, key: str) -> Any:
        note(cluster, key, value)
        return value

    @_task(app, name="features.note_silently", ignore_result=True)
    def note_silently(value: Any, key: str) -> Any:
        note(cluster, key, value)
        return value

    @_task(app, bind=True)
    def hold(self: Any, gate: str, key: str = "", stage: str = "") -> str:
        """Start, tell that it did, and run until the gate is open."""
        if stage:
            self.update_state(state=stage, meta={"waits_for": gate})
        note(cluster, key or f"started:{self.request.id}", self.request.hostname)
        while not cluster.client.exists(f"test:{gate}"):
            time.sleep(0.02)
        return str(self.request.hostname)

    @_task(app, track_started=True)
    def tracked(gate: str) -> str:
        while not cluster.client.exists(f"test:{gate}"):
            time.sleep(0.02)
        return "tracked"

    @_task(app, bind=True)
    def old_errback(self: Any, failed_id: str, key: str) -> None:
        """An error callback that is sent as a job, with the id of the one that failed."""
        note(cluster, key, failed_id)

    @_task(app)
    def new_errback(request: Any, exc: BaseException, traceback: Any, key: str = "") -> None:
        """An error callback that is called with the request and the error."""
        note(cluster, key or f"errback:{request.id}", [request.id, repr(exc)])

    class Hooked(ClusterTask):
        abstract = True

        def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
            note(cluster, f"hooks:{task_id}", ["on_success", retval])

        def on_failure(self, exc: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
            note(cluster, f"hooks:{task_id}", ["on_failure", repr(exc)])

        def on_retry(self, exc: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
            note(cluster, f"hooks:{task_id}", ["on_retry", repr(exc)])

        def after_return(self, status: str, retval: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
            note(cluster, f"hooks:{task_id}", ["after_return", status])

    @_task(app, base=Hooked, bind=True)
    def watched(self: Any, outcome: str) -> str:
        """Succeed, fail or retry once, under hooks and signals that leave a trace."""
        if outcome == "retry" and not self.request.retries:
            raise self.retry(countdown=0)
        if outcome == "fail":
            raise ValueError(outcome)
        return outcome

    def told(name: str, task: Any, task_id: str) -> None:
        if task.name == watched.name:
            note(cluster, f"signals:{task_id}", name)

    # Not weak: these functions have no other owner.
    signals.task_received.connect(lambda request, **_: told("received", request.task, request.id), weak=False)
    signals.task_prerun.connect(lambda task, task_id, **_: told("prerun", task, task_id), weak=False)
    signals.task_postrun.connect(lambda task, task_id, **_: told("postrun", task, task_id), weak=False)
    signals.task_success.connect(lambda sender, **_: told("success", sender, sender.request.id), weak=False)
    signals.task_failure.connect(lambda sender, task_id, **_: told("failure", sender, task_id), weak=False)
    signals.task_retry.connect(lambda sender, request, **_: told("retry", sender, request.id), weak=False)
    signals.task_revoked.connect(lambda sender, request, **_: told("revoked", sender, request.id), weak=False)


class Refused(Exception):
    """An error of two arguments."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(code, reason)
        self.code, self.reason = code, reason


def _errors(app: Celery, cluster: Cluster) -> None:
    """Tasks that do not simply end well."""

    @_task(app)
    def fail(*values: Any) -> None:
        raise ValueError(f"refused {list(values)}")

    @_task(app)
    def fail_oddly(kind: str) -> None:
        """Raise errors that are hard to hand on."""
        if kind == "refused":
            raise Refused(7, "no")
        if kind == "memory":
            raise MemoryError("no room")
        local = type("Local", (Exception,), {})
        raise local(lambda: None)

    @_task(app, ignore_result=True, store_errors_even_if_ignored=True)
    def fail_silently() -> None:
        raise ValueError("told all the same")

    @_task(app, bind=True, acks_on_failure_or_timeout=False)
    def fail_unacknowledged(self: Any, seconds: float = 0.0) -> None:
        note(cluster, f"started:{self.request.id}", self.request.hostname)
        time.sleep(seconds)
        raise ValueError("not acknowledged")

    @_task(app, bind=True, max_retries=3)
    def flaky(self: Any, failures: int, countdown: float = 0, max_retries: int | None = None) -> list[Any]:
        """Fail so many times, then return what every try knew of itself."""
        known = [self.request.retries, self.request.delivery_info.get("priority"), (self.request.headers or {})]
        key = f"tries:{self.request.id}"
        if note(cluster, key, known) <= failures:
            error = ValueError(f"try {self.request.retries}")
            raise self.retry(countdown=countdown, exc=error, max_retries=max_retries)
        return [json.loads(value) for value in cluster.client.lrange(f"test:{key}", 0, -1)]

    @_task(app, bind=True)
    def count_down(self: Any, number: int, steps: int = 0) -> int:
        """Retry with other arguments each time; return how many steps it took."""
        if number:
            raise self.retry((number - 1,), {"steps": steps + 1}, countdown=0)
        return steps

    @_task(
        app, bind=True, autoretry_for=(ConnectionError,), dont_autoretry_for=(ConnectionResetError,),
        max_retries=2, retry_backoff=True, retry_jitter=False,
    )  # fmt: skip
    def impatient(self: Any, failures: int, reset: bool = False) -> int:
        if note(cluster, f"times:{self.request.id}", time.time()) <= failures:
            raise ConnectionResetError("reset") if reset else ConnectionError("away")
        return int(self.request.retries)

    @_task(app, bind=True)
    def reject(self: Any, requeue: bool) -> int:
        """Reject its first delivery; return how often it ran."""
        tries = note(cluster, f"started:{self.request.id}", bool(self.request.delivery_info.get("redelivered")))
        if tries == 1:
            raise Reject("not now", requeue=requeue)
        return tries

    @_task(app, bind=True)
    def ignore(self: Any, state: str = "") -> None:
        """Say nothing of how it ended, except by a state of its own."""
        note(cluster, f"started:{self.request.id}", self.request.hostname)
        if state:
            self.update_state(state=state, meta={"by": "hand"})
        raise Ignore

    @_task(app, bind=True)
    def end_by_hand(self: Any, words: str) -> None:
        """Store a failure without raising it."""
        self.update_state(state=FAILURE, meta={"exc_type": "ValueError", "exc_message": [words]})
        raise Ignore

    @_task(app, bind=True)
    def tell_an_end(self: Any, state: str, then: str) -> int:
        """Store a state that is an end, and come to another one; return how often it ran."""
        started = note(cluster, f"started:{self.request.id}", self.request.hostname)
        self.update_state(state=state, meta={"exc_type": "ValueError", "exc_message": ["told"]})
        if then == "fail":
            raise ValueError("raised")
        if then == "retry" and started == 1:
            raise self.retry(countdown=0)
        if then == "die" and started == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return started

    @_task(app, bind=True)
    def die(self: Any, times: int) -> int:
        """Kill its own process so many times; return how often it ran."""
        started = note(cluster, f"started:{self.request.id}", self.request.hostname)
        if started <= min(times, CRASHES_ALLOWED):
            os.kill(os.getpid(), signal.SIGKILL)
        return started

    @_task(app, bind=True)
    def label(self: Any, job_id: str, state: str) -> None:
        """Set the state of another job."""
        self.update_state(task_id=job_id, state=state, meta={"by": self.request.id})


def _limits(app: Celery, cluster: Cluster) -> None:
    """Tasks with limits of time and rate."""

    @_task(app)
    def overrun(catch: bool = False, seconds: float = 60.0) -> str:
        """Run longer than any limit of these tests."""
        try:
            time.sleep(seconds)
        except SoftTimeLimitExceeded:
            if not catch:
                raise
            return "cleaned up"
        return "nobody stopped it"

    @_task(app, soft_time_limit=50, time_limit=60, bind=True)
    def limited(self: Any) -> list[Any]:
        return list(self.request.timelimit or ())

    @_task(app, rate_limit="40/m", bind=True)
    def rare(self: Any, key: str) -> None:
        note(cluster, key, [self.request.hostname, time.time()])


app = make_app(os.environ.get("CLUSTER_BROKER_URL"))
