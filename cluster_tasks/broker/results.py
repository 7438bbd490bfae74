"""The result backend that ends a job in one step: its result is written and its delivery removed, or neither.

It stands in for Celery's Redis backend under the same URL, and only where results live in the broker's Redis, in
whatever database of it: a script cannot span two servers.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cached_property
from typing import Any

import redis
from celery import states
from celery.backends.redis import (
    CHORD_CLAIM_EXTEND_LUA,
    CHORD_CLEANUP_LUA,
    CHORD_PART_RETURN_LUA,
    RedisBackend,
    SentinelBackend,
)
from celery.exceptions import TaskRevokedError
from kombu.exceptions import EncodeError, OperationalError
from kombu.utils.encoding import bytes_to_str, ensure_bytes

from cluster_tasks.broker import deliveries, hedging, plain_json
from cluster_tasks.broker.hedging import Hedge
from cluster_tasks.broker.members import member_ids, members_of
from cluster_tasks.broker.message import Delivery
from cluster_tasks.broker.sequels import being_ended, complete, ended_job, ending, parse_attempt
from cluster_tasks.broker.together import Ends, gathered, gathering
from cluster_tasks.errors import EndNotStored, PayloadTooLarge, StaleCommit
from cluster_tasks.keys import DEFAULT_NAME, Keys
from cluster_tasks.redis_store import (
    RememberedScript,
    database_of,
    is_passing_refusal,
    refusals_as_outages,
    run_script,
    script_source,
)

logger = logging.getLogger(__name__)

JSON = "application/json"
ENDED_LIVES_S = 300
"""How long it is remembered that a job without a result has ended."""
SEQUELS_LIVE_S = 3600
"""How long it is remembered what has followed an end that is committed: a crash makes others look at it again."""
REVOKED_UNHELD = "revoked"
"""The marker of a job that was revoked while no node held it, or one that had not begun it."""
_error_before: ContextVar[BaseException | None] = ContextVar("error_before", default=None)
_NOT_OF_THE_CHORD = (redis.ConnectionError, redis.TimeoutError, OperationalError, EndNotStored, StaleCommit)
"""What keeps a node from publishing the body of a chord, and is no failure of the chord."""


def _is_not_of_the_chord(error: BaseException | None) -> bool:
    return isinstance(error, _NOT_OF_THE_CHORD) or is_passing_refusal(error)


class _BodyNotPublished(redis.ConnectionError):
    """The part of a chord that was to publish its body is delivered again, and then that is done again."""


class _Outrun(StaleCommit):
    """A hedged job was ended by the other node that was given it."""


class _ChordClient(redis.Redis):
    """Keeps the records of a chord that Celery would delete as it gives the chord up."""

    def delete(self, *names: Any) -> Any:
        return 0 if isinstance(sys.exception(), _BodyNotPublished) else super().delete(*names)


class _FencedCommit(RedisBackend):  # type: ignore[misc]
    """Commits the states of jobs that came from a node's list; all else is stored as ever."""

    @cached_property
    def _keys(self) -> Keys:
        return Keys(self.app.conf.broker_transport_options.get("cluster_name", DEFAULT_NAME))

    @cached_property
    def _most_bytes(self) -> int:
        """Of what is stored of a job; 0: no limit."""
        return int(self.app.conf.broker_transport_options.get("cluster_max_result_bytes", 0))

    @cached_property
    def _scripts(self) -> dict[str, redis.commands.core.Script]:
        return {}

    def _script(self, name: str) -> redis.commands.core.Script:
        """``scripts/<name>.lua``, which reaches jobs and results though they are in two databases."""
        if name not in self._scripts:
            parts = (script_source(__package__, part) for part in ("storing", name))
            self._scripts[name] = RememberedScript(self.client, "\n".join((self._databases, *parts)))
        return self._scripts[name]

    @cached_property
    def _databases(self) -> str:
        """The line of Lua that names the databases of jobs and of results."""
        jobs, results = self.app.conf.broker_url, self.app.conf.result_backend
        return f"local jobs_db, results_db = {database_of(jobs)}, {database_of(results)}"

    def _encode(self, data: Any) -> tuple[str, str, Any]:
        if self._speaks_json and (text := plain_json.written(data)) is not None:
            return self.content_type, self.content_encoding, text
        encoded: tuple[str, str, Any] = super()._encode(data)
        return encoded

    def decode(self, payload: Any) -> Any:
        """As ever, and quickly what is plain."""
        if payload and self._speaks_json:
            # What is compressed is no JSON.
            with suppress(ValueError):
                return plain_json.read(payload)
        return super().decode(payload)

    @cached_property
    def _speaks_json(self) -> bool:
        return self.content_type == JSON and (self.accept is None or JSON in self.accept)

    # What Redis does not take costs the connection, as an outage does: the job would be run again without end.

    def _written(self, meta: dict[str, Any], state: str, request: Any) -> Any:
        """An end as it is stored. Raises EncodeError, PayloadTooLarge if it is a success."""
        written = self.encode(meta)
        if state not in states.EXCEPTION_STATES:
            self._check_size(written, request, "result", "store it elsewhere and return where it is")
        return written

    def _check_size(self, written: Any, request: Any, what: str, remedy: str) -> None:
        # A character has four bytes at most.
        if not 0 < self._most_bytes < 4 * len(written):
            return
        if (size := len(ensure_bytes(written))) > self._most_bytes:
            raise PayloadTooLarge(
                f"the {what} of a job of {getattr(request, 'task', None)} has {size} bytes and may have "
                f"{self._most_bytes}: {remedy}, or raise cluster_max_result_bytes"
            )

    def _tellable(self, exc: Any, traceback: Any, request: Any) -> tuple[Any, Any]:
        """An error and its traceback, or, if they are too large to be stored, an error that says so."""
        try:
            written = self.encode([self.encode_result(exc, states.FAILURE), traceback])
            self._check_size(written, request, "error", "the log of its node has it")
        except PayloadTooLarge as too_large:
            return too_large, None
        except EncodeError:
            # Who stores it tells that.
            pass
        return exc, traceback

    # Celery asks for these endings only where a result is to be stored; here each one is a commit.

    def mark_as_done(
        self, task_id: str, result: Any, request: Any = None, store_result: bool = True, state: str = states.SUCCESS
    ) -> None:
        with ending(request), self._first_counts(request):
            if not store_result or getattr(request, "ignore_result", False):
                self._end_without_result(task_id, result, state, None, request)
            super().mark_as_done(task_id, result, request=request, store_result=store_result, state=state)

    def mark_as_failure(
        self, task_id: str, exc: Any, traceback: Any = None, request: Any = None, store_result: bool = True,
        call_errbacks: bool = True, state: str = states.FAILURE,
    ) -> None:  # fmt: skip
        if isinstance(exc, StaleCommit | EndNotStored):
            # Celery takes it for an error of the task. This end must not be replaced by another one: the job has come
            # to its end elsewhere, or will.
            raise exc
        exc, traceback = self._tellable(exc, traceback, request)
        if member_ids(request):
            with self._ends_of_all(request):
                for member in members_of(request):
                    self.mark_as_failure(member.id, exc, traceback, member, store_result, call_errbacks, state)
            return
        with ending(request), self._first_counts(request):
            if not store_result:
                self._end_without_result(task_id, exc, state, traceback, request)
            super().mark_as_failure(task_id, exc, traceback, request, store_result, call_errbacks, state)

    def _fail_chain(
        self, chain: Any, exc: Any, traceback: Any = None, store_result: bool = True, state: str = states.FAILURE
    ) -> None:
        # An earlier run may have sent the next step, and died before its own end was stored: that step goes on, and
        # comes to an end of its own.
        if not (chain and self._has_followed(chain[-1])):
            super()._fail_chain(chain, exc, traceback, store_result, state)

    def _has_followed(self, step: Any) -> bool:
        job_id, next_id = ended_job(), (step.get("options") or {}).get("task_id")
        if not (job_id and next_id):
            return False
        with refusals_as_outages(self.client):
            followed: Any = self._script("followed")([self._keys.followed(job_id)])
        return any(parse_attempt(bytes_to_str(each))[0] == next_id for each in followed)

    def mark_as_revoked(
        self, task_id: str, reason: str = "", request: Any = None, store_result: bool = True,
        state: str = states.REVOKED,
    ) -> None:  # fmt: skip
        if member_ids(request):
            with self._ends_of_all(request):
                for member in members_of(request):
                    self.mark_as_revoked(member.id, reason, member, store_result, state)
            return
        with ending(request), self._first_counts(request):
            if not store_result:
                self._end_without_result(task_id, TaskRevokedError(reason), state, None, request)
            super().mark_as_revoked(task_id, reason, request, store_result, state)

    @contextmanager
    def _first_counts(self, request: Any) -> Iterator[None]:
        """Let the end of a hedged job pass that the other node has ended: this one has done nothing wrong."""
        try:
            yield
        except _Outrun as exc:
            logger.debug("%s", exc)
            # When this delivery is let go, what was kept of the end goes with it, and the other node may die now.
            complete(self, request)

    # One message may be of many jobs, its members. Its own end, which is none of a job, is that of all of them.

    @contextmanager
    def ends_together(self, delivery: Delivery, message_id: str, *, one_by_one: bool = False) -> Iterator[Ends]:
        """While the block lasts, the ends of a message's members are gathered; ``Ends.tell`` commits them.

        ``one_by_one``: each is committed when it is marked, and only results that are marked together are gathered.
        """
        ends = Ends(
            self._commit_members, self._keys, bytes_to_str(self.task_keyprefix), delivery, message_id, ENDED_LIVES_S,
            one_by_one,
        )  # fmt: skip
        with gathered(ends):
            yield ends

    def mark_members_as_done(self, results: Mapping[str, Any], request: Any, wanted: bool) -> dict[str, EncodeError]:
        """Have members of a message succeed with ``results``, by their ids, within ``ends_together``.

        What is stored with a result is made once for all, of ``request``. Returns the errors of those whose results
        cannot be stored: they have not ended. Raises as ``Ends.tell`` does.
        """
        delivery = Delivery.of(request.properties)
        ends = gathering(delivery) if delivery is not None else None
        assert ends is not None
        meta = self._get_result_meta(result=None, state=states.SUCCESS, traceback=None, request=request)
        lives_s, failed = int(self.expires or 0) if wanted else ENDED_LIVES_S, {}
        for task_id, result in results.items():
            try:
                own = {**meta, "result": self.encode_result(result, states.SUCCESS), "task_id": task_id}
                written = self._written(own, states.SUCCESS, request) if wanted else ""
            except EncodeError as exc:
                failed[task_id] = exc
                continue
            ends.add(task_id, written, lives_s, "", states.SUCCESS)
        return failed

    @contextmanager
    def _ends_of_all(self, request: Any) -> Iterator[None]:
        delivery = Delivery.of(getattr(request, "properties", None))
        if delivery is None:
            yield
            return
        with self.ends_together(delivery, request.id) as ends:
            yield
            ends.tell(last=True)

    def _commit_members(self, names: Sequence[str], arguments: Sequence[Any]) -> list[int]:
        try:
            done: list[int] = self.ensure(self._run, (self._script("commit_members"), names, arguments))
        except (redis.ConnectionError, redis.TimeoutError) as exc:
            raise EndNotStored(f"the ends of jobs of one message could not be stored: {exc!r}") from exc
        return done

    # Celery's scripts for chords take a claim, random characters, that its holder alone may use. Here it also says
    # whose delivery holds it.

    @cached_property
    def _chord_part_return_script(self) -> Callable[..., Any]:
        source = self._databases, script_source(__package__, "void_claim"), CHORD_PART_RETURN_LUA
        return self._claiming(RememberedScript(self.client, "\n".join(source)), -1)

    @cached_property
    def _chord_claim_extend_script(self) -> Callable[..., Any]:
        return self._claiming(RememberedScript(self.client, CHORD_CLAIM_EXTEND_LUA), 0)

    @cached_property
    def _chord_cleanup_script(self) -> Callable[..., Any]:
        return self._claiming(RememberedScript(self.client, CHORD_CLEANUP_LUA), 0)

    def _get_client(self) -> type[redis.Redis]:
        return _ChordClient

    def on_chord_part_return(self, request: Any, state: str, result: Any, propagate: Any = None, **kwargs: Any) -> Any:
        # An error of the task itself may be on its way up here.
        token = _error_before.set(sys.exception())
        try:
            with refusals_as_outages(self.client):
                return super().on_chord_part_return(request, state, result, propagate, **kwargs)
        except (redis.ConnectionError, redis.TimeoutError) as exc:
            # Celery would take it for an error of the task, whose end is stored, and count the part as failed.
            raise EndNotStored(f"the part {request.id} of a chord could not be counted: {exc}") from exc
        finally:
            _error_before.reset(token)

    def chord_error_from_stack(self, callback: Any, exc: Any = None) -> Any:
        error = sys.exception()
        if _is_not_of_the_chord(error) and error is not _error_before.get():
            raise _BodyNotPublished(f"the body of a chord could not be published: {error!r}") from error
        try:
            return super().chord_error_from_stack(callback, exc)
        except Exception as failed:
            if not _is_not_of_the_chord(failed):
                raise
            raise _BodyNotPublished(f"the failure of a chord could not be stored: {failed!r}") from failed

    def _claiming(self, script: redis.commands.core.Script, place: int) -> Callable[..., Any]:
        def run(keys: list[str], args: list[Any], client: redis.Redis) -> Any:
            if isinstance(sys.exception(), _BodyNotPublished):  # Celery would clean up.
                return 0
            if (holder := being_ended()) is not None:
                args[place] += f" {self._keys.unacked(holder.node_id, holder.epoch)} {holder.tag}"
            return script(keys=keys, args=args, client=client)

        return run

    def _store_result(
        self, task_id: str, result: Any, state: str, traceback: Any = None, request: Any = None, **kwargs: Any
    ) -> Any:
        delivery = _delivery(task_id, request)
        if delivery is None and state != states.REVOKED:
            return super()._store_result(task_id, result, state, traceback, request=request, **kwargs)
        meta = self._get_result_meta(result=result, state=state, traceback=traceback, request=request)
        meta["task_id"] = bytes_to_str(task_id)
        # Celery's retry policy for results applies: a commit can be repeated, its tag makes it one.
        if delivery is None:
            self.ensure(self._end_unheld, (task_id, self.encode(meta)))
        elif state in states.READY_STATES:
            expires = self.failure_expires if state == states.FAILURE else self.expires
            encoded, lives_s = self._written(meta, state, request), int(expires or 0)
            if ended_job() == task_id:
                kept = encoded if _has_sequel(request, state) else ""
                self._commit(delivery, request, state, encoded, lives_s, kept)
            else:
                self._tell_end(delivery, request, state, encoded, lives_s)
        else:
            self._tell(delivery, request, state, self.encode(meta))
        return result

    def store_new(self, task_id: str, result: Any, state: str) -> None:
        """Store the end of a job whose id nobody knows yet: nothing can be there, and nobody listens for it."""
        meta = self._get_result_meta(
            result=self.encode_result(result, state), state=state, traceback=None, request=None
        )
        meta["task_id"] = bytes_to_str(task_id)
        self.ensure(self._set_unheard, (self.get_key_for_task(task_id), self.encode(meta)))

    def _set_unheard(self, key: str, encoded: Any) -> None:
        with refusals_as_outages(self.client):
            self.client.set(key, encoded, ex=int(self.expires or 0) or None)

    def _tell(self, delivery: Delivery, request: Any, state: str, encoded: Any) -> None:
        try:
            self._check_size(encoded, request, "news", "tell less")
            self.ensure(self._note, (delivery, request.id, encoded, int(self.expires or 0)))
        except (redis.ConnectionError, redis.TimeoutError, PayloadTooLarge) as exc:
            # It is news of the job and no end: a job that goes on, or is tried again, must not fail for it.
            logger.warning("it could not be told that job %s is %s: %r", request.id, state, exc)

    def _tell_end(self, delivery: Delivery, request: Any, state: str, encoded: Any, lives_s: int) -> None:
        """Store an end that a task gives itself while it runs: it may still be tried again, or end in another way."""
        try:
            self.ensure(self._note, (delivery, request.id, encoded, lives_s))
        except (redis.ConnectionError, redis.TimeoutError) as exc:
            # A task that is ignored after this says nothing else.
            raise EndNotStored(f"the state {state} of job {request.id} could not be stored: {exc!r}") from exc

    def _end_without_result(self, task_id: str, result: Any, state: str, traceback: Any, request: Any) -> None:
        delivery = _delivery(task_id, request)
        if delivery is None:
            return
        if not _has_sequel(request, state):
            self._commit(delivery, request, state, "", ENDED_LIVES_S, "")
            return
        told = self.encode_result(result, state)
        meta = self._get_result_meta(result=told, state=state, traceback=traceback, request=request)
        meta["task_id"] = bytes_to_str(task_id)
        self._commit(delivery, request, state, "", ENDED_LIVES_S, self._written(meta, state, request))

    def kept_end(self, task_id: str) -> Any:
        """The end of a job whose result has expired, or was not wanted, and that something still follows; or None."""
        kept = self._script("kept_end")([self._keys.kept_end(task_id)])
        return self.decode_result(kept) if kept else None

    def has_ended(self, task_id: str) -> bool:
        """Whether a job has come to its end. A state that is one may also be what its task told while it ran."""
        return bool(self._script("has_ended")([self._keys.terminal(task_id)]))

    def _note(self, delivery: Delivery, task_id: str, encoded: Any, lives_s: int) -> None:
        self._run(self._script("note"), self._job_keys(delivery, task_id), [delivery.tag, encoded, lives_s])

    def _commit(self, delivery: Delivery, request: Any, state: str, encoded: Any, lives_s: int, kept: Any) -> None:
        keys, task_id, hedge = self._keys, request.id, Hedge.of(request.properties)
        same_end = REVOKED_UNHELD if state == states.REVOKED else ""
        if (ends := gathering(delivery)) is not None:
            ends.end(task_id, encoded, lives_s, same_end, state)
            return
        names = [*self._job_keys(delivery, task_id), keys.counters, keys.crashes(task_id), keys.followed(task_id)]
        names.append(keys.kept_end(task_id))
        arguments = [delivery.tag, encoded, lives_s, kept, same_end, SEQUELS_LIVE_S, state]
        if hedge is not None:
            second = self._second(hedge, delivery, request)
            names += [keys.hedges(second), keys.hedged(second), keys.durations(hedge.kind)]
            arguments += [task_id, hedge.after_s, hedging.REMEMBERED_S, hedging.DURATIONS, hedging.DURATIONS_LIVE_S]
        try:
            done = self.ensure(self._run, (self._script("commit"), names, arguments))
        except (redis.ConnectionError, redis.TimeoutError) as exc:
            raise EndNotStored(f"the end {state} of job {task_id} could not be stored: {exc!r}") from exc
        if done != 1:
            reason = "its delivery was taken away" if done == 0 else "it had ended before"
            refused = _Outrun if hedge is not None and done == -1 else StaleCommit
            raise refused(f"result {state} of job {task_id} by {delivery.node_id} refused: {reason}")

    def _second(self, hedge: Hedge, delivery: Delivery, request: Any) -> str:
        """The node that is to do a job as well: the first one, if it was taken from its list by the one that was to."""
        if hedge.node_id != delivery.node_id:
            return hedge.node_id
        queue = (request.properties.get("delivery_info") or {}).get("routing_key") or ""
        return self._keys.node_of(queue) or hedge.node_id

    def _run(self, script: redis.commands.core.Script, names: Sequence[str], arguments: Sequence[Any]) -> Any:
        with refusals_as_outages(self.client):
            return run_script(self.client, script, names, arguments)

    def _end_unheld(self, task_id: str, encoded: Any) -> None:
        keys, node = self._keys, deliveries.current()
        names = [keys.terminal(task_id), bytes_to_str(self.get_key_for_task(task_id)), keys.epochs]
        own = node.unacked_key if node is not None and node.epoch else ""
        named = json.dumps(bytes_to_str(task_id))
        arguments = [REVOKED_UNHELD, encoded, int(self.expires or 0), keys.node_prefix, keys.unacked_prefix, own]
        self._script("end_unheld")(names, [*arguments, f'"id": {named}', f'"id":{named}'])

    def _job_keys(self, delivery: Delivery, task_id: str) -> tuple[str, str, str]:
        keys, result = self._keys, bytes_to_str(self.get_key_for_task(task_id))
        return keys.unacked(delivery.node_id, delivery.epoch), keys.terminal(task_id), result


def _delivery(task_id: str, request: Any) -> Delivery | None:
    """The delivery that speaks for a job: a task may also store a state of another job, for which its own does not."""
    delivery = Delivery.of(getattr(request, "properties", None))
    return delivery if delivery is not None and request.id == task_id else None


def _has_sequel(request: Any, state: str) -> bool:
    """Whether something is still to be done after the result, so that the delivery must stand until the ack."""
    if request.chord:
        return True
    return bool(state != states.SUCCESS and (getattr(request, "chain", None) or request.errbacks))


class FencedRedisBackend(_FencedCommit):
    """For ``redis://``, ``rediss://`` and ``redis+socket://``."""


class FencedSentinelBackend(_FencedCommit, SentinelBackend):  # type: ignore[misc]
    """For ``sentinel://``."""


FENCED_BACKENDS = {
    "redis": f"{__name__}:FencedRedisBackend",
    "rediss": f"{__name__}:FencedRedisBackend",
    "socket": f"{__name__}:FencedRedisBackend",
    "sentinel": f"{__name__}:FencedSentinelBackend",
}
"""What Celery's loader is told to use by URL scheme."""
