"""The text of jobs while they run, on a real node: for threads, for asyncio, from the middle, and cancelled."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.exceptions import TaskRevokedError
from celery.exceptions import TimeoutError as CeleryTimeout

from cluster_tasks import Cluster
from cluster_tasks.cluster import cluster_of
from cluster_tasks.errors import InvalidArguments, ProviderError, StreamRestarted
from cluster_tasks.tasks import embedding, follow, llm, rag, retrieval, stream
from cluster_tasks.tasks.streams import Chunk, Finished, Restarted, TextStream
from cluster_tasks.testing import CHAT_PATH, FakeOpenAI
from tests.integration.ready_made import WITHIN_S, node
from tests.servers import redis_for_results
from tests.waiting import wait_until
from workers.redis_server import RedisServer

# Celery's own way to store a result that expires.
pytestmark = pytest.mark.filterwarnings("ignore:Call to deprecated setex")
DECLARED = (embedding, llm, rag, retrieval)
SAID = "one two three four five six seven eight"


@dataclass
class Site:
    """An app that sends to one worker, and its two providers."""

    app: Celery
    first: FakeOpenAI
    second: FakeOpenAI

    def stream(self, prompt: str = SAID, **given: Any) -> TextStream:
        """Ask for an answer, which is the prompt."""
        given = {"timeout_s": WITHIN_S, **given}
        return stream(self.app.tasks["llm.generate"], prompt=prompt, **given)

    @property
    def cluster(self) -> Cluster:
        """That of the app."""
        return cluster_of(self.app)


@pytest.fixture(scope="module")
def _site(redis_binary: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp("streams")
    with (
        redis_for_results(directory / "redis") as broker,
        RedisServer(directory / "cache") as cache,
        FakeOpenAI() as first,
        FakeOpenAI() as second,
    ):
        settings = {
            "CLUSTER_LLM_BASE_URL": first.base_url, "CLUSTER_LLM_MODEL": "fake-chat",
            "CLUSTER_LLM_FALLBACKS": f'[{{"base_url": "{second.base_url}", "model": "other"}}]',
            "CLUSTER_PROVIDER_MAX_RETRIES": "0", "CLUSTER_BREAKER_FAILURE_THRESHOLD": "1000",
            "CLUSTER_CACHE_URL": cache.url, "CLUSTER_CACHE_TIMEOUT_S": "5",
        }  # fmt: skip
        with node(broker.url, "streams", directory, **settings) as app:
            yield Site(app, first, second)
            cluster_of(app).caches.close()


@pytest.fixture
def site(_site: Site) -> Iterator[Site]:
    """With providers that do as they should."""
    yield _site
    for server in (_site.first, _site.second):
        server.recover()
        server.pace_s = 0.0
        server._replies.clear()
        server.left = 0


def kinds(events: list[Any]) -> list[Any]:
    return ["text" if isinstance(event, Chunk) else type(event) for event in events]


def fail_late(server: FakeOpenAI, status: int) -> None:
    """Let the next answer fail in its midst, as soon as it is released."""
    server.reply("alpha beta gamma delta")
    server.hang(events=3, status=status)


# For threads.


def test_text_comes_while_it_is_made_and_the_result_is_that_of_the_job(site: Site) -> None:
    site.first.hang(events=4)
    tokens = site.stream()
    texts = iter(tokens)
    seen = next(texts)
    assert SAID.startswith(seen)
    assert not tokens.job.ready(), "it is still being made"
    site.first.release()
    seen += "".join(texts)
    assert seen == SAID
    assert tokens.result == tokens.job.get(timeout=WITHIN_S)
    assert tokens.result["text"] == SAID
    assert tokens.result["usage"]["total_tokens"] == 16
    assert list(tokens) == [], "it was read"


def test_a_job_that_is_never_read_ends_as_any_other(site: Site) -> None:
    assert site.stream().job.get(timeout=WITHIN_S)["text"] == SAID


def test_nothing_that_is_left_in_redis_stays_for_ever(site: Site) -> None:
    tokens = site.stream()
    list(tokens)
    keys, client = site.cluster.keys, site.cluster.client
    for key in (keys.stream(tokens.job.id), keys.stream_reader(tokens.job.id)):
        assert 0 < client.ttl(key) <= 120


def test_an_error_of_the_job_is_raised_where_it_is_read(site: Site) -> None:
    site.first.fail(400, message="refused")
    tokens = site.stream()
    for _ in range(2):
        with pytest.raises(ProviderError, match="refused"):
            list(tokens)


def test_wrong_arguments_are_refused_before_anything_is_sent(site: Site) -> None:
    with pytest.raises(InvalidArguments):
        site.stream("")
    with pytest.raises(ValueError, match="cancel_after_s"):
        site.stream(cancel_after_s=0)
    with pytest.raises(ValueError, match="ignored"):
        site.stream(options={"ignore_result": True})


def test_a_reader_waits_no_longer_than_he_said(site: Site) -> None:
    site.first.hang()
    tokens = site.stream(timeout_s=0.3)
    with pytest.raises(CeleryTimeout):
        next(iter(tokens))
    site.first.release()
    tokens._timeout_s = WITHIN_S
    assert "".join(tokens) == SAID, "he may read on"


# When the answer is begun again.


def test_a_provider_that_fails_in_the_midst_is_followed_by_another_from_the_beginning(site: Site) -> None:
    fail_late(site.first, 503)
    site.second.reply("one two three")
    tokens = site.stream()
    texts = iter(tokens)
    assert next(texts).startswith("alpha")
    site.first.release()
    with pytest.raises(StreamRestarted):
        list(texts)
    assert "".join(tokens) == "one two three"
    assert (tokens.result["text"], tokens.result["degraded"]) == ("one two three", True)


def test_events_tell_of_a_restart_in_their_midst(site: Site) -> None:
    fail_late(site.first, 429)
    site.second.reply("one")
    coming = site.stream().events()
    events = [next(coming)]
    site.first.release()
    events += coming
    restarted = kinds(events).index(Restarted)
    assert set(kinds(events[:restarted])) == {"text"}
    assert kinds(events[restarted:]) == [Restarted, "text", Finished]
    assert events[-1].result["text"] == "one"


# From the middle.


def test_one_can_go_on_after_any_chunk_with_nothing_missing_and_nothing_twice(site: Site) -> None:
    site.first.pace_s = 0.06
    tokens = site.stream()
    chunks = [event for event in tokens.events() if isinstance(event, Chunk)]
    assert len(chunks) > 2
    for number, chunk in enumerate(chunks):
        rest = follow(tokens.job.id, chunk.id, app=site.app, timeout_s=WITHIN_S)
        assert "".join(rest) == "".join(each.text for each in chunks[number + 1 :])
        assert rest.result == tokens.result
    assert list(follow(tokens.job, "end")) == [], "it has all of it"
    assert "".join(follow(tokens.job)) == SAID
    site.cluster.client.delete(site.cluster.keys.stream(tokens.job.id))
    assert kinds(list(follow(tokens.job, chunks[0].id).events())) == [Restarted, "text", Finished], "it has expired"


def test_another_reader_goes_on_while_it_is_made(site: Site) -> None:
    site.first.hang(events=3)
    tokens = site.stream()
    texts = iter(tokens)
    seen = next(texts)
    site.first.release()
    assert seen + "".join(follow(tokens.job.id, tokens.last_id, app=site.app, timeout_s=WITHIN_S)) == SAID


# Cancelled.


def test_who_cancels_ends_the_job_at_its_next_piece_and_the_provider_is_told(site: Site) -> None:
    site.first.pace_s = 0.05
    tokens = site.stream("word " * 400)
    next(iter(tokens))
    tokens.cancel()
    with pytest.raises(TaskRevokedError):
        tokens.job.get(timeout=WITHIN_S)
    wait_until(lambda: site.first.left == 1, message="the provider need not go on")
    with pytest.raises(TaskRevokedError):
        list(tokens)


def test_a_job_whose_reader_stays_away_is_cancelled_if_that_was_asked_for(site: Site) -> None:
    site.first.pace_s = 0.05
    tokens = site.stream("word " * 400, cancel_after_s=1.0)
    next(iter(tokens))
    with pytest.raises(TaskRevokedError):
        tokens.job.get(timeout=WITHIN_S)
    wait_until(lambda: site.first.left == 1)


def test_a_job_that_waits_is_cancelled_before_it_has_begun(site: Site) -> None:
    before = site.first.counts[CHAT_PATH]
    site.first.hang(times=2)
    busy = [site.stream(f"busy {number}") for number in range(2)]
    wait_until(lambda: site.first.counts[CHAT_PATH] == before + 2, WITHIN_S)
    waiting = site.stream("never said")
    waiting.cancel()
    site.first.release()
    assert ["".join(tokens) for tokens in busy] == ["busy 0", "busy 1"]
    with pytest.raises(TaskRevokedError):
        list(waiting)
    assert site.first.counts[CHAT_PATH] == before + 2


# What is kept, and other jobs.


def test_a_kept_answer_comes_at_once_and_a_streamed_one_is_kept_whole(site: Site) -> None:
    before = site.first.counts[CHAT_PATH]
    first = site.stream("what is kept", temperature=0)
    assert "".join(first) == "what is kept"
    again = site.stream("what is kept", temperature=0)
    assert list(again) == ["what is kept"]
    assert again.result == {**first.result, "cached": True, "age_s": again.result["age_s"]}
    # In the worker, for this is more than a wish for a result.
    late = site.stream("what is kept", temperature=0, options={"countdown": 0.01})
    assert list(late) == ["what is kept"]
    assert site.first.counts[CHAT_PATH] == before + 1


def test_an_answer_that_was_cancelled_is_not_kept(site: Site) -> None:
    site.first.pace_s = 0.05
    said = "word " * 400
    tokens = site.stream(said, temperature=0)
    next(iter(tokens))
    tokens.cancel()
    with pytest.raises(TaskRevokedError):
        list(tokens)
    site.first.pace_s = 0.0
    again = site.stream(said, temperature=0)
    assert "".join(again) == said
    assert not again.result["cached"]


def test_who_cancels_ends_no_other_job_that_makes_the_same_answer(site: Site) -> None:
    said = "the same for both"
    site.first.hang(times=2, events=3)
    one, other = (site.stream(said, temperature=0) for _ in range(2))
    assert next(iter(one)).startswith("the")
    texts = iter(other)
    assert next(texts).startswith("the"), "each reader sees it while it is made"
    one.cancel()
    wait_until(lambda: site.cluster.client.hget(site.cluster.keys.stream_reader(one.job.id), "gone"))
    site.first.pace_s = 0.5
    site.first.release()
    list(texts)
    assert other.result["text"] == said
    with pytest.raises(TaskRevokedError):
        one.job.get(timeout=WITHIN_S)


def test_a_retry_is_streamed_as_well(site: Site) -> None:
    generate = site.app.tasks["llm.generate"]
    generate.push_request(id="id", args=(), kwargs={}, called_directly=False, cluster_stream={"cancel_after_s": 2})
    try:
        again = generate.signature_from_request(generate.request)
    finally:
        generate.pop_request()
    assert again.options["headers"] == {"cluster_stream": {"cancel_after_s": 2}}


def test_an_answer_from_a_collection_is_streamed_by_its_last_step(site: Site) -> None:
    added = site.app.tasks["retrieval.add_documents"].delay("facts", ["The sky is blue."])
    added.get(timeout=WITHIN_S)
    site.first.reply("It is blue")
    site.first.hang(events=3)
    tokens = stream(site.app.tasks["rag.answer"], "What colour is the sky?", "facts", timeout_s=WITHIN_S)
    texts = iter(tokens)
    seen = next(texts)
    assert not tokens.job.ready()
    site.first.release()
    assert seen + "".join(texts) == "It is blue"
    assert tokens.result["passages"][0]["text"] == "The sky is blue."


def test_a_job_without_text_has_only_its_result(site: Site) -> None:
    tokens = stream(site.app.tasks["embedding.embed"], "a text", cache=False, timeout_s=WITHIN_S)
    (event,) = tokens.events()
    assert isinstance(event, Finished)
    assert len(event.result["vectors"]) == 1


# For asyncio.


def own_threads() -> set[threading.Thread]:
    """All but those in which the provider answers its connections."""
    return {thread for thread in threading.enumerate() if "process_request_thread" not in thread.name}


async def read(tokens: TextStream) -> str:
    return "".join([text async for text in tokens])


def test_asyncio_reads_many_at_once_and_blocks_no_thread(site: Site) -> None:
    site.first.pace_s = 0.02

    async def main() -> list[str]:
        streams = [site.stream(f"{SAID} {number}") for number in range(10)]
        before = own_threads()
        said = await asyncio.gather(*map(read, streams))
        assert own_threads() <= before
        assert [tokens.result["text"] for tokens in streams] == said
        return said

    assert asyncio.run(main()) == [f"{SAID} {number}" for number in range(10)]


def test_asyncio_is_told_of_restarts_errors_and_known_answers(site: Site) -> None:
    async def main() -> None:
        fail_late(site.first, 503)
        site.second.reply("one two three")
        tokens = site.stream()
        texts = aiter(tokens)
        assert (await anext(texts)).startswith("alpha")
        site.first.release()
        with pytest.raises(StreamRestarted):
            [text async for text in texts]
        assert await read(tokens) == "one two three"
        site.first.fail(400, message="refused")
        with pytest.raises(ProviderError, match="refused"):
            await read(site.stream())
        kept = site.stream("kept for asyncio", temperature=0)
        assert await read(kept) == "kept for asyncio"
        assert await read(site.stream("kept for asyncio", temperature=0)) == "kept for asyncio"

    asyncio.run(main())


def test_a_reader_of_asyncio_that_is_cancelled_leaves_no_connection(site: Site) -> None:
    site.first.hang(events=3)
    tokens = site.stream()

    async def main() -> None:
        texts = aiter(tokens)
        while "".join(said) != "one two ":
            said.append(await anext(texts))
        waiting = asyncio.ensure_future(anext(texts))
        await asyncio.wait([waiting], timeout=0.3)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    said: list[str] = []
    asyncio.run(main())
    site.first.release()
    assert "".join([*said, *tokens]) == SAID, "he may read on, without asyncio, too"


# Without a cluster at work.


def test_an_app_whose_jobs_are_run_at_once_streams_their_text(redis_url: str, tmp_path: Path) -> None:
    with Celery("eager", set_as_current=False, broker=redis_url) as app:
        app.conf.update(task_always_eager=True, cluster_data_dir=str(tmp_path))
        Cluster(app)
        passages = ["Backups run at two.", "Logs are kept for a week."]
        asked = {"prompt": "When do backups run?", "passages": passages}
        generate = app.tasks["llm.generate"]
        assert list(stream(generate, **asked)) == ["Backups run at two."]
        assert asyncio.run(read(stream(generate, **asked))) == "Backups run at two."
