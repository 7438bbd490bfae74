"""Sessions with a language model, of several turns: ``python -m benchmarks.llm [--full] [--json]``.

Each worker has a server of its own, see ``benchmarks.llm_server``: it reads prompts and writes answers as slowly as a
real one, keeps the beginnings of prompts that it has read, refuses some requests with 429 and never answers others.
People ask, read the answer for a while, and ask again, with all that was said before; together they keep more than half
of the slots busy. All servers together can keep what all sessions have said, none by itself.

Compared are ``llm.generate`` of the cluster, with its default strategy for ``llm``, and plain Celery, with one queue
for all workers and with a queue for each, of which one is drawn for each question. The same sessions at the same pace,
one way after the other on the same Redis and servers, whose memory of the one before is of no use to the next.
Plain Celery's task has the same SDK with the same time-outs and repeats.

Told are the seconds from question to answer, the part of the prompts that was warm, and what was never answered.

Marks: the p50 is no higher than that of one queue, with 1.5 times the warm part.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.request import urlopen

import redis

from benchmarks.chatting import CHAT, GENERATE, LLM_URL, MODEL, TIMEOUT_S, make_app
from benchmarks.figures import percentile
from benchmarks.fleet import RESULT, Fleet, patient
from benchmarks.llm_server import BLOCK
from benchmarks.report import Benchmark, Mark, Row
from benchmarks.sleeping import CLUSTER, STOCK
from benchmarks.stage import HOME, private_redis

ONE_QUEUE, RANDOM_QUEUE, OURS = "Celery, one queue", "Celery, random queue", "cluster"
MARK_WARM = 1.5
COMMON_TOKENS, QUESTION_TOKENS, FIRST_TOKENS = 200, 60, 600
"""Of what all sessions begin with, of each question, and of the first one, which brings a document."""
THINKS_S = 1.0
"""On average, between an answer and the next question."""
BEGINS_WITHIN_S = 3.0
LOOK_EVERY_S = 0.01
GIVE_UP_S = 60.0
"""A question that has no answer by then has none."""
SHARED_QUEUE = "shared"


@dataclass(slots=True)
class Session:
    """Somebody who asks."""

    name: str
    turns: int
    rng: random.Random
    messages: list[dict[str, str]]
    asked: int = 0
    prompts: int = 0
    """Tokens of all prompts so far."""
    repeated: int = 0
    """Of these, whole blocks with which the prompt before had begun as well: more cannot be warm."""

    @classmethod
    def begin(cls, number: int, turns: int, beside: str) -> Session:
        """``beside`` tells the sessions of one way from those of another, so that none profits of the other."""
        common = words(random.Random(beside), COMMON_TOKENS)
        return cls(f"s{number}", turns, random.Random(number), [{"role": "system", "content": f"{beside} {common}"}])

    def ask(self) -> None:
        """Put the next question behind what was said."""
        count = FIRST_TOKENS if self.asked == 0 else QUESTION_TOKENS
        # The last answer was written there, and not read.
        before = tokens_of(self.messages if self.asked == 0 else self.messages[:-1])
        self.asked += 1
        self.messages.append({"role": "user", "content": f"{self.name}.{self.asked} {words(self.rng, count)}"})
        self.prompts += tokens_of(self.messages)
        self.repeated += before // BLOCK * BLOCK

    def hear(self, answer: str) -> float | None:
        """Take the answer; return after how many seconds the next question comes, None after the last."""
        self.messages.append({"role": "assistant", "content": answer})
        return self.rng.expovariate(1 / THINKS_S) if self.asked < self.turns else None


def tokens_of(messages: Sequence[Mapping[str, str]]) -> int:
    """How long a prompt is."""
    return sum(len(message["content"].split()) for message in messages)


def words(rng: random.Random, count: int) -> str:
    """Return a text of so many tokens."""
    return " ".join(f"t{rng.randrange(10_000)}" for _ in range(count))


@dataclass(slots=True)
class Outcome:
    """What came of all sessions of one way."""

    waited_s: list[float] = field(default_factory=list)
    """Of each question; one that failed counts as long as one that was given up."""
    failed: int = 0
    servers: Mapping[str, int] = field(default_factory=dict)
    """What they counted meanwhile."""
    most_warm: float = 0.0
    """The share that is warm where each session meets all that it has said."""

    def fail(self) -> None:
        """Count a question that was not answered."""
        self.failed += 1
        self.waited_s.append(GIVE_UP_S)

    @property
    def warm(self) -> float:
        """Share of the tokens of all prompts that need not be read again."""
        return self.servers["kept"] / self.servers["prompt"] if self.servers.get("prompt") else 0.0

    def figures(self) -> dict[str, float]:
        """Return what the table shows."""
        return {
            "answers": len(self.waited_s) - self.failed,
            "failed": self.failed,
            "p50, s": percentile(self.waited_s, 0.5),
            "p99, s": percentile(self.waited_s, 0.99),
            "warm, %": 100 * self.warm,
            "429": self.servers["429"],
            "hung": self.servers["hung"],
        }


class Way:
    """One way to send questions to workers."""

    def __init__(self, name: str, url: str, workers: int, rng: random.Random) -> None:
        self.name, self._workers, self._rng = name, workers, rng
        self._app = make_app(CLUSTER if name == OURS else STOCK, url)

    def send(self, session: Session) -> str:
        """Send the question of a session; return the id of the job."""
        arguments = {"messages": session.messages, "session_id": session.name, "user": self.name}
        if self.name == OURS:
            sent = self._app.tasks[GENERATE].apply_async(kwargs=arguments)
        else:
            number = self._rng.randrange(self._workers)
            queue = SHARED_QUEUE if self.name == ONE_QUEUE else own_queue(number)
            sent = self._app.tasks[CHAT].apply_async(kwargs=arguments, queue=queue)
        # Nobody listens to what Celery has subscribed to.
        self._app.backend.result_consumer.on_after_fork()
        return str(sent.id)

    def close(self) -> None:
        """Give up all connections."""
        self._app.close()


def own_queue(number: int) -> str:
    """The queue of one worker."""
    return f"own{number}"


def converse(
    sessions: Sequence[Session], send: Callable[[Session], str], client: redis.Redis, rng: random.Random
) -> Outcome:
    """Hold all sessions; return what came of them, without what the servers counted."""
    outcome = Outcome()
    due = [(time.monotonic() + rng.uniform(0, BEGINS_WITHIN_S), number) for number in range(len(sessions))]
    heapq.heapify(due)
    waiting: dict[str, tuple[int, float]] = {}
    while due or waiting:
        now_s = time.monotonic()
        while due and due[0][0] <= now_s:
            _, number = heapq.heappop(due)
            sessions[number].ask()
            # From the call on: to place a question is part of the time to the answer.
            asked_s = time.monotonic()
            waiting[send(sessions[number])] = number, asked_s
        for job, meta in _ended(client, list(waiting)).items():
            number, asked_s = waiting.pop(job)
            if meta["status"] != "SUCCESS":
                outcome.fail()
                continue
            outcome.waited_s.append(time.monotonic() - asked_s)
            if (pause_s := sessions[number].hear(meta["result"]["text"])) is not None:
                heapq.heappush(due, (time.monotonic() + pause_s, number))
        for job in [job for job, (_, asked_s) in waiting.items() if now_s - asked_s > GIVE_UP_S]:
            del waiting[job]
            outcome.fail()
        time.sleep(LOOK_EVERY_S)
    outcome.most_warm = sum(each.repeated for each in sessions) / sum(each.prompts for each in sessions)
    return outcome


def _ended(client: redis.Redis, jobs: Sequence[str]) -> dict[str, Any]:
    if not jobs:
        return {}
    stored: Any = client.mget([RESULT + job for job in jobs])
    return {job: json.loads(text) for job, text in zip(jobs, stored, strict=True) if text}


@contextmanager
def language_models(count: int) -> Iterator[list[str]]:
    """Run so many servers while the block lasts; yield their URLs."""
    command = [sys.executable, "-m", "benchmarks.llm_server", "--servers", str(count)]
    with subprocess.Popen(command, cwd=HOME, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield json.loads(process.stdout.readline())
        finally:
            process.stdin.close()
            process.wait()


def counted(urls: Sequence[str]) -> dict[str, int]:
    """What all servers have counted so far."""
    total: dict[str, int] = {}
    for url in urls:
        with urlopen(url, timeout=GIVE_UP_S) as reply:
            for name, count in json.load(reply).items():
                total[name] = total.get(name, 0) + count
    return total


def rows(outcomes: Mapping[str, Outcome]) -> Iterator[Row]:
    """Return them for the table; ratios are to the time, and to the warm part, of one queue."""
    other = outcomes[ONE_QUEUE]
    for name, outcome in outcomes.items():
        ratio = percentile(outcome.waited_s, 0.5) / percentile(other.waited_s, 0.5)
        mark = Mark(at_most=1.0) if name == OURS else None
        yield Row(name, outcome.figures(), ratio, mark)
    ours = outcomes[OURS]
    yield Row(
        "cluster, warm", {"warm, %": 100 * ours.warm}, ours.warm / other.warm if other.warm else float("inf"),
        Mark(at_least=MARK_WARM),
        reason=f"{ours.most_warm:.0%} of all prompts is repeated, and {other.warm:.0%} is warm with one queue",
    )  # fmt: skip


benchmark = Benchmark("llm", __doc__)
benchmark.option("--workers", short=4, full=8, help="of each of the two, with a server for each")
benchmark.option("--slots", short=4, full=4, help="of each worker")
benchmark.option("--sessions", short=24, full=48, help="at once")
benchmark.option("--turns", short=4, full=20, help="of each session")
benchmark.option("--seed", short=1, full=1, help="of what is left to chance")


def measure(options: argparse.Namespace) -> Iterator[Row]:
    outcomes = {}
    with private_redis() as server, language_models(options.workers) as urls, ExitStack() as stack:
        names = [f"n{number}@fleet" for number in range(options.workers)]
        fleets = {
            variant: stack.enter_context(Fleet(server, variant, options.slots, app="benchmarks.chatting"))
            for variant in (STOCK, CLUSTER)
        }
        by_node = dict(zip(names, urls, strict=True))
        fleets[CLUSTER].start_coordinator()
        fleets[CLUSTER].start(
            names,
            environ=lambda name: {
                "CLUSTER_LLM_BASE_URL": by_node[name], "CLUSTER_LLM_MODEL": MODEL,
                "CLUSTER_LLM_TIMEOUT_S": str(TIMEOUT_S), "CLUSTER_DATA_DIR": str(server.directory / "data"),
            },
        )  # fmt: skip
        fleets[STOCK].start(
            names,
            lambda name: ["-Q", f"{SHARED_QUEUE},{own_queue(names.index(name))}"],
            lambda name: {LLM_URL: by_node[name]},
        )
        for fleet in fleets.values():
            fleet.wait_ready()
        client = patient(server.url)
        stack.callback(client.close)
        for name in (ONE_QUEUE, RANDOM_QUEUE, OURS):
            way = Way(name, server.url, options.workers, random.Random(options.seed))
            sessions = [
                Session.begin(number, options.turns, name.replace(" ", "-")) for number in range(options.sessions)
            ]
            before = counted(urls)
            outcome = converse(sessions, way.send, client, random.Random(options.seed))
            outcome.servers = {key: count - before[key] for key, count in counted(urls).items()}
            outcomes[name] = outcome
            way.close()
    yield from rows(outcomes)


if __name__ == "__main__":
    sys.exit(benchmark.run(measure))
