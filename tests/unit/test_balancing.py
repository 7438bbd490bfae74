"""What every strategy promises, the registry of strategies, and what the strategies share."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from cluster_tasks import balancing
from cluster_tasks.balancing import BalancerContext, RoundRobin, create_balancer, register_strategy, strategy_names
from cluster_tasks.balancing.base import SentCounter, Views, reported_in_flight
from cluster_tasks.clock import ManualClock
from cluster_tasks.errors import ConfigurationError, NoNodeAvailable
from cluster_tasks.model import Capacity, Load, Node, Request

BUILT_IN = ("adaptive", "consistent_hash", "least_connection", "round_robin", "weighted")

ids = st.sampled_from([f"gpu{number}@host" for number in range(6)])
counts = st.integers(min_value=0, max_value=9)
loads = st.builds(
    Load,
    current_connections=counts,
    queue_length=counts,
    cpu_usage_percent=st.floats(0, 200),
    success_rate=st.floats(0, 1),
)
nodes_of_an_id = st.builds(
    Node,
    id=ids,
    epoch=st.sampled_from(["1-a", "2-b"]),
    load=loads,
    capacity=st.builds(Capacity, max_connections=counts, max_memory_mb=counts),
    metadata=st.dictionaries(st.just("weight"), st.sampled_from(["1", "2.5", "0", "heavy"])),
)
views = st.lists(nodes_of_an_id, min_size=1, max_size=6, unique_by=lambda node: node.id).map(tuple)
requests = st.builds(Request, type=st.sampled_from(["llm", "embedding"]), affinity=st.sampled_from(["", "a", "b", "c"]))


def balancer_named(name: str, seed: int = 1) -> balancing.Balancer:
    return create_balancer(name, clock=ManualClock(), rng=random.Random(seed), virtual_nodes=20)


class AnyOrder(RuleBasedStateMachine):
    """Updates, choices, records and changes of members, in any order."""

    @initialize(name=st.sampled_from(BUILT_IN), seed=st.integers(0, 9))
    def create(self, name: str, seed: int) -> None:
        self.clock = ManualClock()
        self.nodes: tuple[Node, ...] = ()
        self.balancer = create_balancer(name, clock=self.clock, rng=random.Random(seed), virtual_nodes=20)

    @rule(nodes=views)
    def the_view_changes(self, nodes: tuple[Node, ...]) -> None:
        self.nodes = nodes
        self.balancer.update(nodes)

    @rule(nodes=views)
    def a_breaker_changes_who_may_take_jobs(self, nodes: tuple[Node, ...]) -> None:
        self.nodes = nodes

    @precondition(lambda self: self.nodes)
    @rule(request=requests, times=st.integers(1, 20))
    def select(self, request: Request, times: int) -> None:
        for _ in range(times):
            chosen = self.balancer.select(request, self.nodes)
            assert any(chosen is node for node in self.nodes)

    @rule(node_id=ids, success=st.booleans())
    def record(self, node_id: str, success: bool) -> None:
        self.balancer.record(node_id, success, latency_s=0.2)

    @rule(seconds=st.floats(0, 20))
    def time_passes(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule(request=requests)
    def nobody_can_take_it(self, request: Request) -> None:
        with pytest.raises(NoNodeAvailable):
            self.balancer.select(request, ())


TestOnlyNodesOfTheViewAreChosen = AnyOrder.TestCase


@pytest.mark.parametrize("name", BUILT_IN)
def test_no_node_is_a_clear_error(name: str) -> None:
    with pytest.raises(NoNodeAvailable, match=r"no node may take a 'llm' job.*serves 'llm'"):
        balancer_named(name).select(Request("llm"), ())


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_list_that_changes_in_place_is_read_anew(name: str) -> None:
    balancer, nodes = balancer_named(name), [Node(id="a"), Node(id="b"), Node(id="c")]
    for _ in range(3):
        balancer.select(Request("llm", affinity="key"), nodes)
    del nodes[1:]
    assert {balancer.select(Request("llm", affinity="key"), nodes).id for _ in range(5)} == {"a"}


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_same_random_source_gives_the_same_choices(name: str) -> None:
    nodes = tuple(Node(id=f"n{number}") for number in range(7))

    def choices() -> list[str]:
        balancer = balancer_named(name, seed=3)
        balancer.update(nodes)
        return [balancer.select(Request("llm", affinity=str(turn % 3)), nodes).id for turn in range(50)]

    assert choices() == choices()


class OnlyTheFirst(balancing.Balancer):
    """A user's own strategy: it inherits ``update`` and ``record``."""

    def __init__(self, context: BalancerContext) -> None:
        self.context = context

    def select(self, request: Request, nodes: Sequence[Node]) -> Node:
        return nodes[0]


@pytest.fixture
def registry_as_it_was() -> Iterator[None]:
    before = dict(balancing._factories)
    yield
    balancing._factories.clear()
    balancing._factories.update(before)


def test_the_five_strategies_have_names() -> None:
    assert strategy_names() == BUILT_IN


@pytest.mark.usefixtures("registry_as_it_was")
def test_a_users_strategy_is_built_from_clock_random_source_and_virtual_nodes() -> None:
    register_strategy("only_the_first", OnlyTheFirst)
    clock, rng = ManualClock(), random.Random(1)
    balancer = create_balancer("only_the_first", clock=clock, rng=rng, virtual_nodes=7)
    balancer.update(())
    balancer.record("a", True, 0.1)
    assert isinstance(balancer, OnlyTheFirst)
    assert balancer.context == BalancerContext(clock, rng, 7)
    assert "only_the_first" in strategy_names()


@pytest.mark.usefixtures("registry_as_it_was")
def test_a_name_cannot_be_taken_twice() -> None:
    register_strategy("only_the_first", OnlyTheFirst)
    register_strategy("only_the_first", OnlyTheFirst)
    for name in ("only_the_first", "round_robin"):
        with pytest.raises(ConfigurationError, match=f"named '{name}' is registered already"):
            register_strategy(name, lambda _: RoundRobin())


def test_an_unknown_strategy_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigurationError, match=r"'round_robbin' is unknown; did you mean 'round_robin'\?.*weighted"):
        balancer_named("round_robbin")


def test_two_balancers_of_one_strategy_share_no_state() -> None:
    nodes = (Node(id="a"), Node(id="b"))
    first, second = balancer_named("round_robin"), balancer_named("round_robin")
    assert [balancer.select(Request("llm"), nodes).id for balancer in (first, second)] == ["a", "a"]


def test_in_flight_is_what_was_reported_plus_what_was_sent_since() -> None:
    busy, idle = Node(id="busy", load=Load(current_connections=2, queue_length=3)), Node(id="idle")
    sent = SentCounter()
    sent.add("busy")
    sent.add("busy")
    sent.add("gone")
    assert [sent.in_flight(busy), sent.in_flight(idle)] == [7, 0]
    assert sent.in_flight_each(reported_in_flight([idle, busy])) == [0, 7]
    sent.clear()
    assert sent.in_flight(busy) == 5


def test_what_derives_from_a_view_is_computed_once() -> None:
    derivations: list[tuple[list[str], list[str] | None]] = []

    def derive(nodes: Sequence[Node], previous: list[str] | None) -> list[str]:
        derived = [node.id for node in nodes]
        derivations.append((derived, previous))
        return derived

    views_of_ids, llm, embedding = Views(derive), Request("llm"), Request("embedding")
    first, second = (Node(id="a"), Node(id="b")), (Node(id="a"),)
    for _ in range(3):
        assert views_of_ids.of(llm, first) == ["a", "b"]
        assert views_of_ids.of(embedding, second) == ["a"]
    assert views_of_ids.of(llm, second) == ["a"]
    assert derivations == [(["a", "b"], None), (["a"], None), (["a"], ["a", "b"])]
