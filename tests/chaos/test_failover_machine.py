"""Whatever happens to nodes and observers in whatever order: no job is lost or doubled, and every failover is finished.

A counterpart of ``tests/integration/test_conservation.py``, which foretells the outcome of each single script: here
observers die, are cut off or stand still between any two commands, and only what must hold in the end is asked for.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from cluster_tasks.errors import NodeNotFound
from cluster_tasks.failover.evacuation import Evacuation
from cluster_tasks.keys import ANY_TYPE
from tests.broker import job_of
from tests.chaos.conftest import ByLevel
from tests.chaos.world import LEASE_S, SERVES, STEP_S, Member, Observer, World

NODES = st.sampled_from(sorted(SERVES.keys() - {"last"}))
TYPES = st.sampled_from(["llm", "llm", "embedding", ANY_TYPE])
FATES = st.sampled_from(["killed", "reply lost", "refused", "paused"])
COMMANDS = st.one_of(st.just(1), st.integers(0, 40))
"""At which one: 0 looks, 1 fences, the others move and tell."""
MOST = 4
"""Observers at once."""
LONG = 2 * int(LEASE_S / STEP_S) + 2
"""Steps in which the silent are found, also by an observer that begins anew and when most are silent."""


class Failover(RuleBasedStateMachine):
    """The steps of nodes, producers, operators and observers, in any order, and what befalls them."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.world = World(url)

    def teardown(self) -> None:
        try:
            self.settle()
            self.do_all_that_is_left()
        finally:
            self.world.close()

    def a_member(self, data: st.DataObject) -> Member:
        """One that may work or, as often, any: also one that was fenced and does not know."""
        members = self.world.members
        standing = [member for member in members if self.world.stands(member)]
        return data.draw(st.sampled_from(standing if standing and data.draw(st.booleans()) else members))

    def a_member_at_work(self, data: st.DataObject) -> Member:
        """One that holds jobs, one of them not begun, and has some in its list, if it is not fenced."""
        member = self.a_member(data)
        for kind in data.draw(st.lists(TYPES, min_size=2, max_size=5)):
            self.world.publish(member.node_id, kind)
        self.world.fetch(member, data.draw(st.integers(1, 2)))
        if member.held:
            self.world.hold_back(member, min(member.held))
        return member

    def an_observer(self, data: st.DataObject) -> Observer:
        """One that is not paused, maybe a new one."""
        free = [observer for observer in self.world.observers if observer.paused is None]
        if not free or (len(self.world.observers) < MOST and data.draw(st.booleans())):
            self.world.observers.append(self.world.new_observer())
            return self.world.observers[-1]
        return data.draw(st.sampled_from(free))

    # Nodes.

    @initialize(nodes=st.sets(NODES, min_size=2))
    def begin(self, nodes: set[str]) -> None:
        for node_id in sorted(nodes):
            self.world.join(node_id)

    @rule(node_id=NODES)
    def join(self, node_id: str) -> None:
        self.world.join(node_id)

    @rule(node_id=NODES)
    def join_in_the_place_of_a_silent_one(self, node_id: str) -> None:
        seen = self.world.broker.epochs.beats().get(node_id)
        self.world.pass_time(int(LEASE_S / STEP_S), check=False)
        if seen is not None and self.world.broker.epochs.beats().get(node_id) == seen:
            self.world.new_observer().health.fail_over(node_id, seen, LEASE_S)
        self.world.note_fences()
        self.world.join(node_id)

    @rule(data=st.data(), fate=st.sampled_from(["killed", "reply lost", "refused"]), at=COMMANDS)
    def leave(self, data: st.DataObject, fate: str, at: int) -> None:
        member, process = self.a_member_at_work(data), self.world.new_observer()
        member.beats = False
        self.world.meet_fate(process, lambda: process.health.retire(member.node_id, member.epoch), fate, at)

    @rule(data=st.data())
    def stop_or_go_on_beating(self, data: st.DataObject) -> None:
        member = self.a_member(data)
        member.beats = not member.beats

    @rule(data=st.data())
    def beat(self, data: st.DataObject) -> None:
        self.world.beat(self.a_member(data))

    @rule(data=st.data(), want=st.integers(1, 5), acks=st.booleans())
    def fetch(self, data: st.DataObject, want: int, acks: bool) -> None:
        member = self.a_member(data)
        done = [tag for tag in member.held if tag in self.world.ended.values()]
        self.world.fetch(member, want, done if acks else ())

    @rule(data=st.data(), leave=st.booleans())
    def commit(self, data: st.DataObject, leave: bool) -> None:
        member = self.a_member(data)
        if member.held:
            self.world.commit(member, data.draw(st.sampled_from(sorted(member.held))), leave)

    @rule(data=st.data())
    def hold_back(self, data: st.DataObject) -> None:
        member, world = self.a_member(data), self.world
        if member.held:
            world.hold_back(member, data.draw(st.sampled_from(sorted(member.held))))

    @rule(data=st.data(), is_crash=st.booleans())
    def give_back(self, data: st.DataObject, is_crash: bool) -> None:
        member = self.a_member(data)
        if member.held:
            self.world.give_back(member, data.draw(st.sampled_from(sorted(member.held))), is_crash)

    # Producers and operators.

    @rule(node_id=st.sampled_from([*"abcd", ""]), kind=TYPES, count=st.integers(1, 4), is_delayed=st.booleans())
    def publish(self, node_id: str, kind: str, count: int, is_delayed: bool) -> None:
        for _ in range(count):
            self.world.publish(node_id, kind, is_delayed)

    @rule(node_id=NODES, what=st.sampled_from(["drain", "resume", "release", "wait"]))
    def operate(self, node_id: str, what: str) -> None:
        world, epochs = self.world, self.world.broker.epochs
        if what == "release":
            world.release()
        elif what == "wait":
            world.make_due()
        elif node_id in world.standing():
            epochs.set_draining(node_id, what == "drain")
            world.broker.evacuation.hand_over(node_id)
        else:
            with pytest.raises(NodeNotFound):
                epochs.set_draining(node_id, what == "drain")

    # Observers, and what they lean on.

    @rule(steps=st.integers(1, LONG), check=st.booleans())
    def pass_time(self, steps: int, check: bool) -> None:
        self.world.pass_time(steps, check)

    @rule(data=st.data(), at=COMMANDS, wakes=st.booleans())
    def lose_a_node_between_two_observers(self, data: st.DataObject, at: int, wakes: bool) -> None:
        """One stands still at a command, the other does what it likes, and the node may not be dead at all."""
        member = self.lose_a_node(data)
        one = self.an_observer(data)
        self.world.meet_fate(one, one.check, "paused", at)
        if wakes:
            self.world.beat(member)
        if data.draw(st.booleans()):
            self.an_observer(data).check()
        else:
            self.check_and_meet_a_fate(data)
        self.world.finish(one)
        self.go_on_as_if_nothing_had_happened(member)

    @rule(data=st.data())
    def lose_a_node_and_its_observer(self, data: st.DataObject) -> None:
        member = self.lose_a_node(data)
        self.check_and_meet_a_fate(data)
        self.go_on_as_if_nothing_had_happened(member)

    def lose_a_node(self, data: st.DataObject) -> Member:
        member = self.a_member_at_work(data)
        member.beats, self.world.registry.is_down = False, data.draw(st.booleans())
        self.world.pass_time(LONG, check=False)
        return member

    def go_on_as_if_nothing_had_happened(self, member: Member) -> None:
        self.world.note_fences()
        for tag in list(member.held):
            self.world.hold_back(member, tag)
            self.world.commit(member, tag)
        self.world.fetch(member, 1)

    @rule(data=st.data())
    def check_and_meet_a_fate(self, data: st.DataObject) -> None:
        observer = self.an_observer(data)
        self.world.meet_fate(observer, observer.check, data.draw(FATES), data.draw(COMMANDS))

    @rule()
    def go_on_after_a_pause(self) -> None:
        for observer in self.world.observers:
            self.world.finish(observer)

    @rule(data=st.data())
    def be_interrupted(self, data: st.DataObject) -> None:
        self.an_observer(data).health.interrupted()

    @rule(is_down=st.booleans(), forgets=st.booleans())
    def lose_the_registry(self, is_down: bool, forgets: bool) -> None:
        self.world.registry.is_down = is_down
        if forgets:
            self.world.registry.forget_all()

    # What always holds.

    @invariant()
    def the_books_are_right(self) -> None:
        world = self.world
        world.note_fences()
        world.check_places()
        world.check_fences()
        world.check_charges()
        world.check_events()

    # What holds in the end.

    def settle(self) -> None:
        """With Redis, a registry and one observer there, nothing is left undone."""
        world = self.world
        world.registry.is_down = False
        self.go_on_after_a_pause()
        if not world.observers:
            world.observers.append(world.new_observer())
        world.pass_time(LONG)
        world.observers[0].health.reap()
        world.check_settled()

    def do_all_that_is_left(self) -> None:
        """A node that joins now can do every job, and leaves nothing behind."""
        self.world.do_all_that_is_left()


@pytest.mark.chaos("core")
@pytest.mark.parametrize("at", range(6))  # More than it has commands, then nothing happens.
def test_who_looks_for_orphans_while_a_node_is_fenced_makes_no_job_pay_that_had_not_begun(
    redis_url: str, at: int
) -> None:
    world = World(redis_url)
    member = world.join("a")
    assert member is not None
    for _ in range(2):
        world.publish("a", "llm")
    world.fetch(member, 2)
    idle, at_work = sorted(member.held)
    world.hold_back(member, idle)
    observer = world.new_observer()

    def fence() -> None:
        observer.fuse.disarm()
        world.broker.epochs.fence("a", world.broker.epochs.beats()["a"], {})
        world.note_fences()

    observer.fuse.arm(at, fence)
    Evacuation(observer.client, world.keys).move_orphans()
    world.new_observer().health.finish()
    charged = {tag: len(world.crashes(job_of(message))) for tag, message in member.held.items()}
    was_fenced = "a" not in world.standing()
    assert charged == {idle: 0, at_work: int(was_fenced)}
    observer.client.close()
    world.close()


@pytest.mark.chaos("core")
@pytest.mark.timeout(1800)
def test_no_order_of_events_loses_or_doubles_a_job_or_leaves_a_failover_undone(
    redis_url: str, by_level: ByLevel, rng: random.Random
) -> None:
    machine = seed(rng.random())(lambda: Failover(redis_url))
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        machine,
        settings=settings(
            max_examples=by_level(core=25, short=50, full=600), stateful_step_count=20, deadline=None, database=None,
            # To shrink a failure takes hours; the seed of the run finds it again.
            suppress_health_check=list(HealthCheck), phases=[Phase.generate],
        ),
    )  # fmt: skip
