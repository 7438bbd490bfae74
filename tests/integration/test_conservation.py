"""Whatever is done in whatever order: every job is in exactly one place, and the books are right.

A model in Python foretells the outcome of each step; after each, the whole of Redis is compared with it.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from cluster_tasks.broker.epochs import Limit, Phase, Predecessor
from cluster_tasks.broker.members import split
from cluster_tasks.broker.message import Placement, place_message, priority_suffix, replace_message
from cluster_tasks.failover.evacuation import Remains
from cluster_tasks.keys import ANY_TYPE
from cluster_tasks.redis_store import load_script
from tests.broker import SUFFIXES, Broker, job_of, make_members
from tests.known_keys import strange_keys

SERVES = {"a": {"llm"}, "b": {"llm"}, "c": {"llm", "embedding"}, "d": {"embedding"}}
TYPES = ["llm", "embedding", "retrieval", ANY_TYPE]
BAD = b"not a message "

NODES = st.sampled_from(sorted(SERVES))
TARGETS = st.sampled_from([*SERVES, "never-joined", ""])
PRIORITIES = st.sampled_from([0, 0, 0, 3, 9])

Lists = dict[str, deque[str]]

some_node_stands = precondition(lambda self: bool(self.epochs))


def types_of(node: str) -> set[str]:
    return SERVES[node] | {ANY_TYPE}


class Conservation(RuleBasedStateMachine):
    """The steps of nodes, producers, operators and observers, in any order."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.broker = Broker(url)
        self.broker.client.flushall()
        self.purge_script = load_script(self.broker.client, "cluster_tasks.broker", "purge")
        self.published = self.steps = 0
        self.kinds: dict[str, str] = {}
        self.places: dict[str, str] = {}
        """Suffix of each job."""
        self.members: dict[str, list[str]] = {}
        """Those of each message of several jobs."""
        self.lists: dict[str, Lists] = {}
        self.held: dict[tuple[str, str], dict[str, str]] = {}
        """Job by tag, by node and epoch; also of fenced ones, until they are moved."""
        self.fenced: dict[tuple[str, str], Lists] = {}
        self.epochs: dict[str, str] = {}
        self.ended: list[tuple[str, str]] = []
        self.draining: set[str] = set()
        self.limits: dict[str, Limit] = {}
        self.idle: list[str] = []
        self.rings: Counter[str] = Counter()
        self.set_aside: list[str] = []

    def teardown(self) -> None:
        self.broker.close()

    # What the model knows.

    def length(self, queue: str) -> int:
        return sum(map(len, self.lists.get(queue, {}).values()))

    def push(self, queue: str, job: str, front: bool = False) -> None:
        jobs = self.lists.setdefault(queue, {}).setdefault(self.places[job], deque())
        jobs.appendleft(job) if front else jobs.append(job)

    def pop(self, queue: str, most: int) -> Iterator[str]:
        for suffix in SUFFIXES:
            jobs = self.lists.get(queue, {}).get(suffix, deque())
            while jobs and most > 0:
                most -= 1
                yield jobs.popleft()

    def foretell_place(self, node: str, kind: str) -> str:
        """Return the list that a job goes to, and ring whom it rings."""
        if not self.may_get(node):
            node = ""
        target = f"node.{node}" if node else f"waiting.{kind}"
        if node in self.idle:
            self.ring(node)
            return target
        able = [other for other in self.idle if kind in types_of(other) and other not in self.draining]
        allowed = [other for other in able if not node or types_of(other) >= types_of(node)]
        if allowed:
            self.ring(allowed[0])
        elif able:
            self.ring(able[0])
            return f"node.{able[0]}"
        return target

    def may_get(self, node: str) -> bool:
        """Whether jobs may be placed on a node."""
        ramps = node not in self.limits or self.limits[node].phase is Phase.RAMPING
        return node in self.epochs and node not in self.draining and ramps

    def ring(self, node: str) -> None:
        self.idle.remove(node)
        self.rings[node] += 1

    def foretell_fetch(self, node: str, want: int) -> list[str]:
        waiting = [f"waiting.{kind}" for kind in sorted(types_of(node))]
        given: list[str] = []
        for queue in [*waiting, f"node.{node}"]:
            given += self.pop(queue, want - len(given))
        while len(given) < want and (peer := self.longest_peer(node)):
            given += self.pop(peer, 1)
        return given

    def longest_peer(self, node: str) -> str | None:
        peers = [f"node.{peer}" for peer in self.epochs if peer != node and types_of(peer) <= types_of(node)]
        return max((queue for queue in peers if self.length(queue)), key=lambda q: (self.length(q), q), default=None)

    def evacuate(self, source: Lists) -> None:
        """Listed jobs go behind those that wait, in their order."""
        for suffix in SUFFIXES:
            for job in source.pop(suffix, ()):
                if job in self.kinds:
                    self.push(self.foretell_place("", self.kinds[job]), job)
                else:
                    self.set_aside.append(job)

    def draw_standing(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(sorted(self.epochs)))

    # What can happen.

    @initialize(nodes=st.sets(NODES, min_size=1))
    def begin(self, nodes: set[str]) -> None:
        for node in sorted(nodes):
            self.open_an_epoch(node)

    @rule(node=NODES)
    def open_an_epoch(self, node: str) -> None:
        opened = self.broker.epochs.open(node, SERVES[node])
        if node in self.epochs:
            assert isinstance(opened, Predecessor)
            assert opened.beat.epoch == self.epochs[node]
        else:
            assert isinstance(opened, str)
            self.epochs[node] = opened

    @rule(node=TARGETS, kind=st.sampled_from(TYPES), priority=PRIORITIES, count=st.integers(1, 3))
    def publish(self, node: str, kind: str, priority: int, count: int) -> None:
        for _ in range(count):
            self.published += 1
            job = f"job {self.published}"
            self.kinds[job], self.places[job] = kind, priority_suffix(priority)
            expected = self.foretell_place(node, kind)
            assert self.broker.publish(job, node, kind, priority) == expected
            self.push(expected, job)

    @rule(node=NODES)
    def publish_what_nobody_can_read(self, node: str) -> None:
        self.published += 1
        job = f"{BAD.decode()}{self.published}"
        self.places[job] = ""
        expected = self.foretell_place(node, ANY_TYPE)
        placement = Placement(f"node.{node}", f"waiting.{ANY_TYPE}", ANY_TYPE, "", job)
        assert self.broker.placer.place([placement]) == [expected]
        self.push(expected, job)

    @rule(node=TARGETS, kind=st.sampled_from(TYPES), count=st.integers(1, 3))
    def publish_several_in_one_message(self, node: str, kind: str, count: int) -> None:
        self.published += 1
        job = f"job {self.published}"
        self.kinds[job], self.places[job] = kind, ""
        self.members[job] = [f"{job}.{number}" for number in range(count)]
        expected = self.foretell_place(node, kind)
        assert self.broker.put(make_members(self.members[job], job, kind), f"node.{node}" if node else "") == expected
        self.push(expected, job)

    @some_node_stands
    @rule(data=st.data())
    def split_one(self, data: st.DataObject) -> None:
        node, keys = self.draw_standing(data), self.broker.keys
        epoch = self.epochs[node]
        held = self.held.get((node, epoch), {})
        several = sorted(tag for tag, job in held.items() if job in self.members)
        if not several:
            return
        tag = data.draw(st.sampled_from(several))
        job = held.pop(tag)
        message = self.broker.client.hget(keys.unacked(node, epoch), tag)
        assert isinstance(message, bytes)
        singles = [place_message(payload, json.dumps(payload), keys) for payload in split(message)]
        source = keys.unacked(node, epoch), keys.not_started(node, epoch)
        members = self.members[job]
        assert self.broker.placer.split(*source, tag, keys.crashes(job), singles, None) == len(members)
        for member in reversed(members):
            self.kinds[member], self.places[member] = self.kinds[job], ""
            self.push(self.foretell_place("", self.kinds[job]), member, front=True)

    @some_node_stands
    @rule(want=st.integers(0, 5), data=st.data())
    def fetch(self, want: int, data: st.DataObject) -> None:
        node = self.draw_standing(data)
        epoch = self.epochs[node]
        held = self.held.setdefault((node, epoch), {})
        acked = data.draw(st.lists(st.sampled_from(sorted(held)), unique=True)) if held else []
        for tag in acked:
            del held[tag]
        fetched = self.broker.fetch(node, epoch, want, SERVES[node], acked)
        if node in self.draining:
            assert (fetched.status, fetched.messages) == ("draining", {})
            self.idle = [other for other in self.idle if other != node]
            return
        limit = self.limits.get(node)
        assert fetched.status == ("ok" if limit is None else f"limited {limit.trial}")
        probes = limit is not None and limit.phase is Phase.HALF_OPEN
        if limit is not None:
            want = min(want, 1 if probes else max(limit.slots - len(held), 0))
        assert fetched.jobs == self.foretell_fetch(node, want)
        held.update(zip(fetched.messages, fetched.jobs, strict=True))
        if probes and fetched.jobs:
            assert limit is not None
            self.limits[node] = Limit(0, Phase.PROBING, limit.trial, limit.probes + 1)
        if len(fetched.jobs) == want or probes:
            self.idle = [other for other in self.idle if other != node]
        elif node not in self.idle:
            self.idle.append(node)
            # Redis' clock cannot be foretold; who came later idles less long.
            self.steps += 1
            self.broker.client.zadd(self.broker.keys.idle, {f"node.{node}": self.steps}, xx=True)

    @some_node_stands
    @rule(data=st.data())
    def fetch_all_that_is_there(self, data: st.DataObject) -> None:
        self.fetch(100, data)

    @rule(node=NODES)
    def answer_the_bell(self, node: str) -> None:
        self.broker.client.delete(self.broker.keys.bell(node))
        self.rings.pop(node, None)

    @precondition(lambda self: bool(self.ended))
    @rule(data=st.data())
    def act_under_an_epoch_that_has_ended(self, data: st.DataObject) -> None:
        node, epoch = data.draw(st.sampled_from(self.ended))
        fetched = self.broker.fetch(node, epoch, 5, SERVES[node], list(self.held.get((node, epoch), {})))
        assert (fetched.status, fetched.messages) == ("fenced", {})
        assert not self.broker.epochs.close(node, epoch)

    @some_node_stands
    @rule(data=st.data())
    def give_one_back(self, data: st.DataObject) -> None:
        node = self.draw_standing(data)
        held = self.held.get((node, self.epochs[node]), {})
        readable = sorted(tag for tag, job in held.items() if job in self.kinds)
        if readable:
            tag = data.draw(st.sampled_from(readable))
            job = held.pop(tag)
            unacked = self.broker.keys.unacked(node, self.epochs[node])
            message = self.broker.client.hget(unacked, tag)
            assert isinstance(message, bytes)
            placement = replace_message(message, self.broker.keys, delivered=True)
            assert self.broker.move_held(node, self.epochs[node], [(tag, placement)]) == 1
            self.push(self.foretell_place("", self.kinds[job]), job, front=True)

    @some_node_stands
    @rule(draining=st.booleans(), data=st.data())
    def drain_or_resume(self, draining: bool, data: st.DataObject) -> None:
        node = self.draw_standing(data)
        self.broker.epochs.set_draining(node, draining)
        (self.draining.add if draining else self.draining.discard)(node)

    @some_node_stands
    @rule(phase=st.sampled_from([None, Phase.EJECTED, Phase.HALF_OPEN, Phase.RAMPING]), data=st.data())
    def limit_or_not(self, phase: Phase | None, data: st.DataObject) -> None:
        node = self.draw_standing(data)
        slots = {Phase.EJECTED: 0, Phase.HALF_OPEN: 1, Phase.RAMPING: 2}
        wanted = Limit(slots[phase], phase, f"t{self.steps}") if phase else None
        assert self.broker.epochs.limit(node, self.epochs[node], self.limits.pop(node, None), wanted)
        if wanted:
            self.limits[node] = wanted
            self.idle = [other for other in self.idle if other != node]

    @rule(node=NODES)
    def hand_over(self, node: str) -> None:
        expected = sum(job in self.kinds for jobs in self.lists.get(f"node.{node}", {}).values() for job in jobs)
        assert self.broker.evacuation.hand_over(node).listed == expected
        self.evacuate(self.lists.pop(f"node.{node}", {}))

    @some_node_stands
    @rule(taker=TARGETS, first=st.integers(0, 3), count=st.integers(1, 4), data=st.data())
    def move_newest(self, taker: str, first: int, count: int, data: st.DataObject) -> None:
        node, suffix = self.draw_standing(data), data.draw(st.sampled_from(SUFFIXES))
        source = f"node.{node}"
        read = self.broker.client.lrange(source + suffix, first, first + count - 1)
        known = [message for message in reversed(read) if job_of(message) in self.kinds]
        placements = [
            replace(replace_message(message, self.broker.keys, delivered=False), queue=f"node.{taker}")
            for message in known
        ]
        moved = self.broker.placer.move_newest(source + suffix, source, first, placements)
        if not self.may_get(taker):
            assert moved == []
            return
        jobs = [job_of(message) for message in known]
        for job in jobs:
            self.lists[source][suffix].remove(job)
        expected = []
        for job in jobs:
            expected.append(self.foretell_place(taker, self.kinds[job]))
            self.push(expected[-1], job)
        assert moved == expected

    @precondition(lambda self: len(self.epochs) > 1)
    @rule(data=st.data())
    def fence(self, data: st.DataObject) -> None:
        node = self.draw_standing(data)
        epoch = self.epochs.pop(node)
        self.ended.append((node, epoch))
        assert self.broker.epochs.close(node, epoch)
        self.fenced[node, epoch] = self.lists.pop(f"node.{node}", {})
        self.held.setdefault((node, epoch), {})
        self.draining.discard(node)
        self.limits.pop(node, None)
        self.idle = [other for other in self.idle if other != node]
        self.rings.pop(node, None)

    @precondition(lambda self: bool(self.fenced))
    @rule(data=st.data())
    def move_remains(self, data: st.DataObject) -> None:
        node, epoch = data.draw(st.sampled_from(sorted(self.fenced)))
        self.broker.evacuation.move_remains(Remains(node, epoch))
        assert self.broker.epochs.forget({(node, epoch): {}}) == [True]
        for job in reversed(self.held.pop((node, epoch)).values()):
            if job in self.kinds:
                self.push(self.foretell_place("", self.kinds[job]), job, front=True)
            else:
                self.set_aside.append(job)
        self.evacuate(self.fenced.pop((node, epoch)))

    @rule()
    def look_for_orphans(self) -> None:
        assert not self.broker.evacuation.move_orphans()

    @rule(queue=st.sampled_from([f"node.{node}" for node in SERVES] + [f"waiting.{kind}" for kind in TYPES]))
    def purge(self, queue: str) -> None:
        keys = [self.broker.keys.backlog, queue, *(queue + suffix for suffix in SUFFIXES)]
        assert self.purge_script(keys) == self.length(queue)
        self.lists.pop(queue, None)

    # What always holds.

    @invariant()
    def every_list_is_as_foretold(self) -> None:
        expected = {queue: jobs for queue, lists in self.lists.items() if (jobs := flatten(lists))}
        queues = [f"node.{node}" for node in (*SERVES, "never-joined")] + [f"waiting.{kind}" for kind in TYPES]
        found = {queue: jobs for queue in queues if (jobs := self.broker.listed(queue))}
        assert found == expected

    @invariant()
    def the_index_tells_the_lengths(self) -> None:
        assert self.broker.epochs.lengths() == {queue: self.length(queue) for queue in self.lists if self.length(queue)}

    @invariant()
    def every_job_is_in_exactly_one_place(self) -> None:
        broker, keys = self.broker, self.broker.keys
        found = list(chain.from_iterable(self.lists_in_redis()))
        for (node, epoch), held in self.held.items():
            hashes = (keys.unacked(node, epoch), keys.remains_unacked(node, epoch))
            recorded = {tag.decode() for name in hashes for tag in broker.client.hkeys(name)}
            assert recorded == set(held)
            found += held.values()
        assert sorted(found) == sorted(set(found))
        expected = [job for lists in (*self.lists.values(), *self.fenced.values()) for job in flatten(lists)]
        expected += chain.from_iterable(held.values() for held in self.held.values())
        assert sorted(found) == sorted(expected)
        assert sorted(message.decode() for message in broker.undecodable()) == sorted(self.set_aside)

    def lists_in_redis(self) -> Iterator[list[str]]:
        patterns = ("node.*", "waiting.*", "cluster:remains:*")
        names = {key.decode() for pattern in patterns for key in self.broker.client.keys(pattern)}
        for queue in sorted({name.split("\x06")[0] for name in names}):
            yield self.broker.listed(queue)

    @invariant()
    def idle_nodes_are_those_that_asked_in_vain_and_were_not_rung(self) -> None:
        assert self.broker.idle() == [f"node.{node}" for node in self.idle]
        assert set(self.idle) <= set(self.epochs)
        assert {node: rings for node in SERVES if (rings := self.broker.rings(node))} == dict(self.rings)

    @invariant()
    def every_key_is_one_that_has_a_name(self) -> None:
        assert strange_keys(self.broker.client, self.broker.keys) == []

    @invariant()
    def the_limits_are_as_foretold(self) -> None:
        limits = self.broker.epochs.lists().limits
        assert limits == {f"node.{node}": limit for node, limit in self.limits.items()}

    @invariant()
    def the_fenced_are_known_until_they_are_moved(self) -> None:
        assert [ended[:2] for ended in self.broker.epochs.fenced()] == sorted(self.fenced)


def flatten(lists: Lists) -> list[str]:
    """The jobs of a list, the next one first."""
    return [job for suffix in SUFFIXES for job in lists.get(suffix, ())]


def check(machine: Callable[[], Conservation], examples: int, steps: int) -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        machine,
        settings=settings(
            max_examples=examples, stateful_step_count=steps, deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip


def test_no_order_of_steps_loses_or_doubles_a_job(redis_url: str) -> None:
    check(lambda: Conservation(redis_url), examples=40, steps=40)
