"""What the benchmarks make of what they see, without workers."""

from __future__ import annotations

import argparse
import asyncio
import random

import pytest

from benchmarks import availability, balance, failover, llm, llm_server, scale
from benchmarks.commands import Identity, Kinds, rates, said_by, words_of
from benchmarks.failover import Failover, Kill, again_s
from benchmarks.fleet import Done, Sent
from benchmarks.growth import Cost, Growth, Recording, script_names, total
from benchmarks.llm import Session
from benchmarks.report import Row

ONE, TEN = Identity("n1@fleet", "1.ab"), Identity("n10@fleet", "10.cd")


def test_a_line_of_monitor_gives_back_the_command_and_not_what_scripts_do() -> None:
    line = rb'+1700000000.1 [0 127.0.0.1:5] "HSET" "k\x06\x16" "say \"hi\"\n" "a\\b"'
    assert words_of(line) == [b"HSET", b"k\x06\x16", b'say "hi"\n', b"a\\b"]
    assert words_of(b'+1700000000.1 [0 lua] "HGET" "k"') is None
    assert words_of(b"+OK") is None


def test_commands_of_a_kind_differ_in_their_node_only() -> None:
    sha = next(sha for sha, name in script_names().items() if name == "fetch")
    kinds = Kinds([ONE, TEN], script_names())

    def fetch(node: Identity) -> list[bytes]:
        return [b"EVALSHA", sha.encode(), b"1", b"cluster:epochs", f"node.{node.node}".encode(), node.epoch.encode()]

    assert kinds.kind(fetch(ONE)) == kinds.kind(fetch(TEN)) == "fetch cluster:epochs"
    assert kinds.kind([b"brpop", b"cluster:bell:node.n1@fleet", b"1"]) == "BRPOP cluster:bell:node.*"
    assert kinds.giver(fetch(TEN)) == TEN
    assert kinds.giver([b"HGETALL", b"cluster:epochs"]) is None
    assert said_by(fetch(TEN), TEN, ONE) == fetch(ONE)
    assert rates([fetch(ONE), fetch(TEN)], kinds.kind, 0.5) == {"fetch cluster:epochs": 4.0}


def recording(size: int, everybody_asks_everybody: bool = False) -> Recording:
    """Each node beats once a second, reads all beats twice, and sixteen ask something else; for ten seconds.

    Or each node asks every other once.
    """
    nodes = [Identity(f"n{number}@fleet", f"{number}.e") for number in range(size)]
    beats = [[b"HINCRBY", b"beats", node.node.encode(), b"1"] for node in nodes for _ in range(10)]
    reads = [[b"HGETALL", b"beats"] for _ in range(size * 20)]
    asks = [[b"GET", b"checks"] for _ in range(16 * 10)]
    pings = [[b"PUBLISH", b"ping"] for _ in range(size * size)] if everybody_asks_everybody else []
    return Recording(nodes, [*beats, *reads, *asks, *pings, [b"GET", b"seldom"]], 10.0)


def test_what_few_nodes_say_tells_how_often_many_would() -> None:
    growth = Growth([recording(20), recording(40)])
    assert growth.per_s("HINCRBY beats", 1_000) == pytest.approx(1_000)
    assert growth.per_s("HGETALL beats", 1_000) == pytest.approx(2_000)
    assert growth.per_s("GET checks", 1_000) == pytest.approx(16)
    assert set(growth.examples) == {"HINCRBY beats", "HGETALL beats", "GET checks"}
    words, giver = growth.examples["HINCRBY beats"][0]
    assert giver == Identity("n0@fleet", "0.e")
    assert words[2] == b"n0@fleet"


@pytest.mark.parametrize(("everybody", "steepest"), [(False, 1.0), (True, 2.0)])
def test_what_every_node_asks_every_other_misses_its_mark(everybody: bool, steepest: float) -> None:
    growth = Growth([recording(20, everybody), recording(40, everybody)])
    assert max(growth.rate_exponents().values()) == pytest.approx(steepest)
    assert scale.rate_row(growth).met is not everybody


def test_what_comes_only_among_many_nodes_has_a_growth_as_well() -> None:
    few, many = recording(20), recording(40, everybody_asks_everybody=True)
    assert Growth([few, many]).rate_exponents()["PUBLISH ping"] > 2


def test_a_cost_that_grows_with_the_square_misses_its_mark_and_others_do_not() -> None:
    # Of each node one a second; reads cost as much as there are nodes.
    costs = {n: {"beat": Cost(n, 10.0), "read": Cost(n, 0.01 * n)} for n in (100, 1_000, 10_000)}
    assert total(costs[1_000]).share == pytest.approx(0.02)
    assert scale.exponents(costs) == {"beat": pytest.approx(1.0), "read": pytest.approx(2.0)}
    real = scale.Idle(100, 1.0, 1.0, total(costs[100]).share, 0.0, 0.0, 0.0, 0.0, 2.0)
    rows = {row.name: row for row in scale.simulated_rows(costs, real)}
    assert rows["100 simulated nodes, idle"].ratio == pytest.approx(1.0)
    assert rows["1,000 simulated nodes, idle"].met is True
    assert rows["steepest growth: read"].met is False
    del costs[10_000]["read"], costs[1_000]["read"], costs[100]["read"]
    assert [row.met for row in scale.simulated_rows(costs, real) if row.name == "steepest growth: beat"] == [True]


def test_the_mark_of_failover_is_of_the_slowest_in_a_hundred() -> None:
    quick = Failover(2.5, 2.6, 0.02, 2.7)
    assert quick.crash_only_s == pytest.approx(0.12)
    by_name = {row.name: row for row in failover.rows(3, [quick] * 99 + [Failover(6.0, 6.1, 0.02, None)])}
    assert by_name["3 nodes, re-owned"].met is True
    assert by_name["3 nodes, at work again"].figures["kills"] == 99
    slow = list(failover.rows(3, [quick] * 98 + [Failover(6.0, 6.1, 0.02, 6.2)] * 2))
    assert [row.met for row in slow if row.mark] == [False]


def test_what_is_not_answered_in_time_or_at_all_counts_against_availability() -> None:
    sent = [Sent(str(number), 100.0, 1.0) for number in range(4)]
    done = [Done(sent[number], 100.0 + waited, 100.0, "n", False) for number, waited in enumerate((1.0, 10.0, 10.1))]
    answers = availability.Answers.of(sent, done)
    assert answers.in_time_percent == 50
    figures = answers.figures(kills=1)
    assert (figures["late"], figures["no answer"], figures["requests"]) == (1, 1, 4)
    assert availability.instants(60, 20) == [20, 40]


def test_jobs_keep_the_workers_as_busy_as_asked_and_are_the_same_again() -> None:
    jobs = balance.requests(random.Random(1), 16, 0.9, 1_000)
    assert sum(job.seconds for job in jobs) / 1_000 / 16 == pytest.approx(0.9, rel=0.03)
    assert jobs == balance.requests(random.Random(1), 16, 0.9, 1_000)


def test_a_job_that_met_another_kill_does_not_tell_how_soon_the_first_was_mended() -> None:
    def kill(at: float, *held: str) -> Kill:
        return Kill("n1@fleet", f"{at:g}.ab", at, frozenset(held), frozenset())

    kills = [kill(10.0, "a", "b", "c"), kill(20.0, "c")]
    begun = {"a": 13.0, "b": 8.0, "c": 24.0}
    assert [again_s(each, kills, begun) for each in kills] == [3.0, 4.0]
    assert again_s(kill(10.0, "c"), kills, begun) is None


def test_what_a_busy_machine_said_is_not_recorded() -> None:
    def looked(size: int, checks_per_s: float) -> tuple[scale.Idle, Recording]:
        return scale.Idle(size, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, checks_per_s), Recording([], [], 10.0)

    kept_up = scale.those_that_kept_up([looked(25, 2.0), looked(50, 1.9), looked(100, 1.82), looked(120, 1.95)])
    assert [cost.size for cost, _ in kept_up] == [25, 50, 120]


def test_the_marks_of_balance_are_held_against_one_queue() -> None:
    shared, static = balance.Outcome(1.0, 20.0, 0.4), balance.Outcome(2.0, 90.0, 0.7)
    assert balance.row(balance.MARKED, 0.9, balance.Outcome(1.0, 20.0, 0.6), shared).met is True
    assert balance.row(balance.MARKED, 0.9, balance.Outcome(1.0, 20.1, 0.6), shared).met is False
    assert balance.row("round_robin", 0.9, balance.Outcome(1.0, 99.0, 0.6), shared).met is None
    assert balance.warm_row(0.9, balance.Outcome(1.0, 20.0, 0.61), shared, static).met is True
    assert balance.warm_row(0.9, balance.Outcome(1.0, 20.0, 0.59), shared, static).met is False
    assert "1.75 times at 4.5 times" in balance.warm_row(0.9, shared, shared, static).reason


def test_a_server_reads_only_what_it_does_not_keep() -> None:
    cache = llm_server.PrefixCache(64)
    first = [f"a{number}" for number in range(32)]
    assert cache.read(first) == 0
    assert cache.read([*first, *(f"b{number}" for number in range(16))]) == 32
    # The same words behind others mean something else.
    assert cache.read([f"c{number}" for number in range(16)] + first) == 0
    assert cache.read(first) == 0, "four blocks are kept, and three came since"


def test_the_same_questions_meet_with_the_same_faults_once_and_those_of_others_with_their_own() -> None:
    questions = [f"s{number}.1" for number in range(10_000)]
    seen: set[str] = set()
    first = [llm_server.fault("one", question, seen) for question in questions]
    assert first == [llm_server.fault("two", question, seen) for question in questions]
    assert not any(llm_server.fault("one", question, seen) for question in questions)
    assert first.count("429") == pytest.approx(200, rel=0.3)
    assert first.count("hang") == pytest.approx(50, rel=0.5)


def test_a_warm_prompt_is_answered_sooner() -> None:
    async def ask() -> list[float]:
        server, loop = llm_server.Server(llm_server.PrefixCache(10_000), {"- q"}), asyncio.get_running_loop()
        took = []
        for _ in range(2):
            begun_s = loop.time()
            message = {"role": "system", "content": llm.words(random.Random(1), 800)}
            body = {"model": "m", "user": "-", "messages": [message, {"role": "user", "content": "q"}]}
            status, reply = await server.answer(body)
            assert (status, reply["usage"]["prompt_tokens"]) == (200, 801)
            took.append(loop.time() - begun_s)
        assert (server.counts["requests"], server.counts["kept"]) == (2, 800)
        return took

    cold_s, warm_s = asyncio.run(ask())
    assert cold_s - warm_s > 0.2


def test_a_session_asks_with_all_that_was_said_and_ends() -> None:
    session = Session.begin(1, 2, "one")
    session.ask()
    assert session.hear("fine") is not None
    session.ask()
    assert [message["role"] for message in session.messages] == ["system", "user", "assistant", "user"]
    assert session.hear("well") is None
    # Of 201 tokens that all begin with and 601 of the first question; then of those 802. The answer was never read.
    assert (session.repeated, session.prompts) == (192 + 800, 802 + 802 + 1 + 61)
    # The same person asks the same, whoever answers.
    other = Session.begin(1, 2, "two")
    other.ask()
    assert other.messages[1] == session.messages[1]
    assert other.messages[0] != session.messages[0]


def test_each_benchmark_closes_with_rows_that_have_marks() -> None:
    outcomes = {
        name: llm.Outcome([1.0, 2.0], 0, {"kept": kept, "prompt": 100, "429": 0, "hung": 0})
        for name, kept in ((llm.ONE_QUEUE, 20), (llm.RANDOM_QUEUE, 20), (llm.OURS, 80))
    }
    rows = list(llm.rows(outcomes))
    assert all(isinstance(row, Row) for row in rows)
    assert [row.met for row in rows if row.mark] == [True, True]
    for each in (availability, balance, failover, llm, scale):
        assert isinstance(each.benchmark.parser, argparse.ArgumentParser)
