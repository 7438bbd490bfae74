"""How a node leaves, with a pool that ends, one that does not, and a Redis that is away."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from cluster_tasks.errors import BrokerUnavailable
from tests.waiting import wait_until
from workers.drain import Departure


class Worker:
    """What a departure is wired to, with a record of what it did."""

    def __init__(self, *, stops: bool = True, outages: int = 0, hopeless: bool = False) -> None:
        self.did: list[str] = []
        self.exit_codes: list[int] = []
        self.foreign: list[str] = []
        self._stops, self._outages, self._hopeless = stops, outages, hopeless

    def departure(self, timeout_s: float) -> Departure:
        return Departure(
            timeout_s, drain=self._step("drain"), hand_back=self._hand_back, hopeless=lambda: self._hopeless,
            foreign=lambda: self.foreign, leave=self._step("leave"), exit_process=self.exit_codes.append,
        )  # fmt: skip

    def _step(self, name: str) -> Callable[[], None]:
        def step() -> None:
            if self._outages:
                self._outages -= 1
                raise BrokerUnavailable("away")
            self.did.append(name)

        return step

    def _hand_back(self) -> bool:
        self.did.append("hand back")
        return self._stops


@pytest.fixture
def started() -> Iterator[Callable[[Departure], Departure]]:
    departures: list[Departure] = []

    def start(departure: Departure) -> Departure:
        departures.append(departure)
        departure.start()
        return departure

    yield start
    for departure in departures:
        departure.stop()
        departure.stop()


Start = Callable[[Departure], Departure]


def test_a_worker_that_ends_by_itself_hands_nothing_back(started: Start) -> None:
    worker = Worker()
    departure = started(worker.departure(60))
    departure.begin()
    wait_until(lambda: worker.did == ["drain"])
    departure.stop()
    assert (worker.did, worker.exit_codes) == (["drain"], [])


def test_a_worker_that_never_began_to_leave_does_nothing_at_its_end(started: Start) -> None:
    worker = Worker()
    departure = started(worker.departure(0))
    departure.stop()
    assert (worker.did, worker.exit_codes) == ([], [])


def test_a_departure_that_was_never_started_can_be_stopped() -> None:
    Worker().departure(0).stop()


def test_after_the_deadline_jobs_are_handed_back_and_a_pool_that_cannot_be_stopped_ends_with_the_process(
    started: Start,
) -> None:
    worker = Worker(stops=False)
    departure = started(worker.departure(0))
    departure.begin(3)
    departure.begin(4)
    wait_until(lambda: worker.exit_codes)
    assert (worker.did, worker.exit_codes) == (["drain", "hand back", "leave"], [3])


def test_a_worker_whose_jobs_were_stopped_may_end_by_itself(started: Start) -> None:
    worker = Worker()
    departure = started(worker.departure(0))
    departure.begin()
    wait_until(lambda: worker.did == ["drain", "hand back"])
    departure.stop()
    assert worker.exit_codes == []


def test_jobs_of_other_queues_are_waited_for(started: Start) -> None:
    worker = Worker(stops=False)
    worker.foreign = ["plain"]
    departure = started(worker.departure(0))
    departure.begin()
    wait_until(lambda: worker.did == ["drain", "hand back"])
    threading.Event().wait(0.5)
    assert worker.exit_codes == []
    worker.foreign = []
    wait_until(lambda: worker.exit_codes == [0])


def test_what_redis_did_not_hear_is_said_again(started: Start) -> None:
    worker = Worker(stops=False, outages=2)
    started(worker.departure(0)).begin()
    wait_until(lambda: worker.exit_codes == [0])
    assert worker.did == ["drain", "hand back", "leave"]


def test_what_others_have_been_given_already_is_not_waited_for(started: Start) -> None:
    worker = Worker(stops=False, hopeless=True)
    started(worker.departure(600)).begin()
    wait_until(lambda: worker.exit_codes == [0])
