"""What every store of locks promises."""

from __future__ import annotations

import logging
import os
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count, pairwise
from multiprocessing import get_context
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster_tasks.errors import LockLost, LocksUnavailable, LockTaken, UnavailableError
from cluster_tasks.locks import Held, Locks
from tests.contract.locking import (
    END_S,
    SPAWN,
    OpenLocks,
    Resource,
    Stage,
    open_redis,
    take_turns,
    writer,
)
from tests.waiting import wait_until

NAMES = [
    "shard/docs/3", "shard:docs:3", "*", "a?[b]{c}", "%d%%", "../x", ".", "..", "a b\n\t", 'q"\'\\', "\0", "größe/索引",
    "return 1 --[[", "x" * 400,
]  # fmt: skip
numbers = count()


@pytest.fixture
def name() -> str:
    """A name that no other test uses: they may share a server."""
    return f"lock {next(numbers)}"


def is_taken(locks: Locks, name: str, ttl_s: float) -> bool:
    try:
        locks.acquire(name, ttl_s).release()
    except LockTaken:
        return True
    return False


# One at a time


def test_of_eight_threads_in_two_processes_one_at_a_time_holds_the_lock(
    stage: Stage, name: str, tmp_path: Path
) -> None:
    arguments = (stage.open, name, tmp_path, 4, 10, 30.0)
    processes = [SPAWN.Process(target=take_turns, args=arguments) for _ in range(2)]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(END_S)
        assert [process.exitcode for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.join()
    written = Resource(tmp_path / "resource").read()
    assert len(written) == 2 * 4 * 10
    assert len({by for by, _ in written}) == 8
    assert all(earlier < later for (_, earlier), (_, later) in pairwise(written))


def test_another_is_told_who_is_late_and_gets_it_after_the_release(open_locks: OpenLocks, name: str) -> None:
    first, second = open_locks(), open_locks()
    held = first.acquire(name, ttl_s=30)
    with pytest.raises(LockTaken, match=re.escape(f"lock {name!r} is held by another")):
        second.acquire(name, ttl_s=30)
    with pytest.raises(LockTaken):
        first.acquire(name, ttl_s=30)
    held.release()
    assert second.acquire(name, ttl_s=30).token > held.token


def test_locks_of_other_names_are_free(locks: Locks, name: str) -> None:
    with locks.acquire(name, ttl_s=30), locks.acquire(f"{name}/", ttl_s=30), locks.acquire(name.upper(), ttl_s=30):
        pass


@pytest.mark.parametrize("odd", NAMES, ids=ascii)
def test_a_name_may_hold_any_character(open_locks: OpenLocks, odd: str) -> None:
    first, second = open_locks(), open_locks()
    others = [first.acquire(name, ttl_s=30) for name in NAMES if name != odd]
    with second.acquire(odd, ttl_s=30) as held:
        with pytest.raises(LockTaken):
            first.acquire(odd, ttl_s=30)
        held.renew()
    for other in others:
        other.release()


# Waiting


def test_who_waits_gets_the_lock_when_it_is_released(open_locks: OpenLocks, name: str) -> None:
    first, second = open_locks(), open_locks()
    held = first.acquire(name, ttl_s=60)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(second.acquire, name, 30.0, END_S)
        time.sleep(0.5)
        assert not waiting.done()
        held.release()
        assert waiting.result(END_S).token > held.token


def test_who_waits_gives_up_when_its_time_is_over(open_locks: OpenLocks, name: str) -> None:
    open_locks().acquire(name, ttl_s=60)
    began_s = time.monotonic()
    with pytest.raises(LockTaken, match=r"waited 0\.7 s"):
        open_locks().acquire(name, ttl_s=60, wait_s=0.7)
    assert time.monotonic() - began_s >= 0.7


# Time


def test_a_lock_that_nobody_renews_goes_to_another_and_not_before_its_time(
    open_locks: OpenLocks, name: str, stage: Stage
) -> None:
    began_s = time.monotonic()
    held = open_locks().acquire(name, ttl_s=stage.ttl_s)
    assert 0 < held.left_s <= stage.ttl_s
    other = open_locks().acquire(name, ttl_s=30, wait_s=END_S)
    # Milliseconds may be rounded.
    assert time.monotonic() - began_s > stage.ttl_s - 0.01
    assert not held.left_s
    assert other.token > held.token
    for call in (held.renew, held.release):
        with pytest.raises(LockLost, match=re.escape(f"lock {name!r} is lost")):
            call()
    other.renew()


def test_a_lock_that_is_renewed_stays(open_locks: OpenLocks, name: str, stage: Stage) -> None:
    held, other = open_locks().acquire(name, ttl_s=stage.ttl_s), open_locks()
    until_s = time.monotonic() + 2.5 * stage.ttl_s
    while time.monotonic() < until_s:
        held.renew()
        assert held.left_s > 0
        assert is_taken(other, name, stage.ttl_s)
        time.sleep(stage.ttl_s / 20)
    held.release()


def test_a_holder_that_was_paused_too_long_is_refused_when_it_wakes(
    open_locks: OpenLocks, name: str, stage: Stage, tmp_path: Path
) -> None:
    resource = Resource(tmp_path / "resource")
    with writer(stage, name, tmp_path / "resource") as (pid, told):
        wait_until(resource.read, END_S, "the first one writes")
        os.kill(pid, signal.SIGSTOP)
        second = open_locks().acquire(name, ttl_s=60, wait_s=END_S)
        assert resource.write("second", second.token)
        os.kill(pid, signal.SIGCONT)
        while (answer := told.recv()) == "wrote":
            assert told.poll(END_S)
    assert answer[-4:] == ["nothing left", "write refused", "refused", "refused"]
    second.renew()
    assert resource.read()[-1] == ("second", second.token)


# Tokens


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(steps=st.lists(st.sampled_from(["acquire", "acquire", "release", "renew", "forget"]), max_size=12))
def test_the_token_of_a_name_grows_whatever_ended_the_lock_before(stage: Stage, locks: Locks, steps: list[str]) -> None:
    name, holder, past = f"lock {next(numbers)}", None, list[Held]()
    for step in steps:
        if step == "acquire" and holder:
            with pytest.raises(LockTaken):
                locks.acquire(name, ttl_s=60)
        elif step == "acquire":
            # A service may hold a lock back for a while that it took from somebody.
            holder = locks.acquire(name, ttl_s=60, wait_s=END_S)
            assert all(holder.token > held.token for held in past)
            past.append(holder)
        elif step == "forget" and holder:
            stage.forget(name)
            holder = None
        elif step == "release" and holder:
            holder.release()
            holder = None
        elif step == "renew" and holder:
            holder.renew()
        for held in past:
            if held is not holder:
                with pytest.raises(LockLost):
                    held.renew()
    if holder:
        holder.release()


def test_the_token_grows_over_a_crash_of_the_server(open_locks: OpenLocks, name: str, stage: Stage) -> None:
    tokens = []
    for _ in range(3):
        with open_locks().acquire(name, ttl_s=30, wait_s=END_S) as held:
            tokens.append(held.token)
        stage.kill()
        stage.start()
    tokens.append(open_locks().acquire(name, ttl_s=30, wait_s=END_S).token)
    assert tokens == sorted(set(tokens))


def test_a_release_leaves_the_lock_of_another_alone(open_locks: OpenLocks, name: str, stage: Stage) -> None:
    first, second = open_locks(), open_locks()
    old = first.acquire(name, ttl_s=60)
    stage.forget(name)
    new = second.acquire(name, ttl_s=60, wait_s=END_S)
    with pytest.raises(LockLost):
        old.release()
    old.release()  # Once is told; it is over.
    assert is_taken(first, name, 30)
    new.renew()
    new.release()
    new.release()
    assert not is_taken(first, name, 30)


# As a context manager


def test_a_block_gives_the_lock_back_however_it_ends(locks: Locks, name: str) -> None:
    with locks.acquire(name, ttl_s=60) as held:
        assert is_taken(locks, name, 30)
    assert not held.left_s
    with pytest.raises(LockLost):
        held.renew()
    with pytest.raises(ZeroDivisionError), locks.acquire(name, ttl_s=60):
        1 / 0  # noqa: B018
    assert not is_taken(locks, name, 30)


def test_a_block_that_lost_the_lock_ends_with_that_unless_it_raised_itself(
    locks: Locks, name: str, stage: Stage
) -> None:
    with pytest.raises(LockLost), locks.acquire(name, ttl_s=60):
        stage.forget(name)
    lost = locks.acquire(name, ttl_s=60, wait_s=END_S)
    stage.forget(name)
    with pytest.raises(ZeroDivisionError), lost:
        1 / 0  # noqa: B018


def test_a_block_that_is_done_does_not_fail_because_the_server_is_away(
    locks: Locks, name: str, stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    with started_again(stage), locks.acquire(name, ttl_s=60):
        stage.kill()
    told = [record for record in caplog.records if record.name == "cluster_tasks.locks.base"]
    assert [(record.levelno, record.getMessage()) for record in told] == [
        (logging.WARNING, "lock not released, it runs out")
    ]


# Outages


@contextmanager
def started_again(stage: Stage) -> Iterator[None]:
    try:
        yield
    finally:
        stage.start()


def test_a_server_that_is_gone_is_an_error_at_once_and_locks_work_when_it_is_back(
    locks: Locks, name: str, stage: Stage
) -> None:
    held = locks.acquire(name, ttl_s=stage.ttl_s)
    with started_again(stage):
        stage.kill()
        began_s = time.monotonic()
        for call in (lambda: locks.acquire("other", ttl_s=30, wait_s=3600), held.renew, held.release):
            with pytest.raises(LocksUnavailable) as caught:
                call()
            assert isinstance(caught.value, UnavailableError)
            assert str(caught.value)
        assert time.monotonic() - began_s < END_S
    locks.acquire(name, ttl_s=30, wait_s=END_S).release()


def test_a_server_that_hangs_hangs_nobody(locks: Locks, name: str, stage: Stage) -> None:
    held = locks.acquire(name, ttl_s=60)
    began_s = time.monotonic()
    with stage.paused():
        with pytest.raises(LocksUnavailable):
            locks.acquire("other", ttl_s=30, wait_s=3600)
        with pytest.raises(LocksUnavailable):
            held.renew()
    assert time.monotonic() - began_s < END_S


# Python 3.12 warns of what is tested here.
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_fork_in_the_midst_of_calls_leaves_both_processes_their_locks(
    stage: Stage, locks: Locks, name: str, tmp_path: Path
) -> None:
    locks.acquire(f"{name} of the parent", ttl_s=60).release()
    children = [
        get_context("fork").Process(target=take_turns, args=(lambda: locks, name, tmp_path, 1, 5, 60.0))
        for _ in range(3)
    ]
    try:
        for child in children:
            child.start()
        take_turns(stage.open, name, tmp_path, 2, 5, 60.0)
        for child in children:
            child.join(END_S)
        assert [child.exitcode for child in children] == [0, 0, 0]
    finally:
        for child in children:
            child.kill()
            child.join()
    assert len(Resource(tmp_path / "resource").read()) == 3 * 5 + 2 * 5


# Arguments


@pytest.mark.parametrize("wrong", ["", "x" * 401, "ä" * 100, "\ud800"], ids=["empty", "long", "quoted", "no text"])
def test_a_name_that_cannot_be_a_key_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match=r"^name=.*expected text of 1 to 400"):
        open_redis("redis://127.0.0.1:1").acquire(wrong, ttl_s=1)


@pytest.mark.parametrize(
    ("ttl_s", "wait_s", "field"),
    [(0, 0, "ttl_s"), (-1, 0, "ttl_s"), (86_401, 0, "ttl_s"), (float("nan"), 0, "ttl_s"), (float("inf"), 0, "ttl_s"),
     (1, -1, "wait_s"), (1, float("inf"), "wait_s"), (1, float("nan"), "wait_s")],
)  # fmt: skip
def test_times_that_cannot_work_are_refused(ttl_s: float, wait_s: float, field: str) -> None:
    with pytest.raises(ValueError, match=rf"^{field}=.*expected seconds"):
        open_redis("redis://127.0.0.1:1").acquire("name", ttl_s, wait_s)


def test_the_locks_that_are_held_are_told_by_name(open_locks: OpenLocks) -> None:
    first, second = open_locks(), open_locks()
    before = {lock.name for lock in first.held()}
    held = [first.acquire(f"held {name}"[:120], ttl_s=60) for name in NAMES]
    told = [lock for lock in second.held() if lock.name not in before]
    assert {lock.name for lock in told} == {lock.name for lock in held}
    assert all(lock.left_s is None or 0 < lock.left_s <= 60 for lock in told)
    for lock in held:
        lock.release()
    # Those of before may have come to their end.
    assert not {lock.name for lock in held} & {lock.name for lock in second.held()}
