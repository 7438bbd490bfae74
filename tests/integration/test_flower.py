"""The cluster page as Flower serves it: a real Redis, a real server, and no browser."""

from __future__ import annotations

import gzip
import json
import threading
import time
from base64 import b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from celery import Celery
from celery.utils.nodenames import gethostname
from flower import urls
from tornado.web import create_signed_value

from cluster_tasks import Cluster, ClusterTask, Node, NodeRole, cluster_of
from cluster_tasks.broker.placement import Crash
from cluster_tasks.failover.events import UNREADABLE
from cluster_tasks.flower.sharing import FRESH_S
from cluster_tasks.flower.templates import add_entry
from cluster_tasks.model import Capacity, Load
from tests.broker import make_message
from tests.flower import Site, flower_site
from tests.waiting import wait_until
from workers.redis_server import RedisServer

END_S = 120.0
HOSTILE = "<img src=x onerror=alert(1)>"
PASSWORD = "user:secret"
LOGIN = "Basic " + b64encode(PASSWORD.encode()).decode()
ACTIONS = (
    "/cluster/nodes/a@x/drain", "/cluster/nodes/a@x/resume",
    "/cluster/quarantine/j/retry", "/cluster/quarantine/j/drop",
)  # fmt: skip


@pytest.fixture
def app(redis_url: str, tmp_path: Path) -> Iterator[Celery]:
    with Celery("paged", set_as_current=False, broker=redis_url) as app:
        app.conf.update(cluster_data_dir=str(tmp_path), cluster_cache_url=redis_url)
        Cluster(app)
        yield app
        cluster_of(app).caches.close()


@pytest.fixture
def site(app: Celery) -> Iterator[Site]:
    with flower_site(app) as site:
        yield site


def join(app: Celery, node_id: str, *roles: NodeRole, serves: str = "llm", load: Load | None = None) -> Node:
    """Let a node join that shows no further sign of life."""
    cluster = cluster_of(app)
    epoch = cluster.epochs.open(node_id, [serves])
    node = Node(
        id=node_id, roles=frozenset(roles or (NodeRole.WORKER,)), serves=frozenset({serves}), epoch=str(epoch),
        capacity=Capacity(max_connections=4), load=load or Load(), last_seen=time.time(),
    )  # fmt: skip
    cluster.registry.register(node)
    return node


def quarantine(app: Celery, job_id: str, reason: str = "SIGKILL") -> None:
    cluster_of(app).quarantine.put(job_id, "jobs.bad", make_message(job_id, "llm"), [Crash("a@x", "1-a", reason, 1.0)])


def rows(site: Site) -> dict[str, dict[str, object]]:
    return {row["id"]: row for row in site.ask("/cluster/snapshot").told["nodes"]}


# What is shown


def test_a_snapshot_tells_how_nodes_stand(app: Celery, site: Site) -> None:
    carried = Load(
        current_connections=3, queue_length=0, cpu_usage_percent=41.4, memory_usage_mb=512, success_rate=0.98
    )
    join(app, "a@x", load=carried)
    join(app, "boss@x", NodeRole.MASTER)
    told = site.ask("/cluster/snapshot").told
    node, boss = told["nodes"]
    assert node.pop("last_seen_s") < END_S
    epoch = node.pop("epoch")
    assert epoch.startswith("1-")
    assert node == {
        "id": "a@x", "status": "online", "limit": "", "roles": ["worker"], "zone": "", "serves": ["llm"], "held": 3,
        "slots": 4, "queue": 0, "qps": 0.0, "cpu_percent": 41, "memory_mb": 512, "success_rate": 0.98,
    }  # fmt: skip
    assert boss["roles"] == ["master"]
    assert told["strategies"] == {"llm": "consistent_hash"}
    assert (told["in_flight"], told["waiting"], told["problems"], told["shards"]) == (3, {}, [], [])
    assert told["cache"]["tiers"][1]["tier"] == "redis"


def test_a_lost_node_stays_in_sight_with_what_became_of_its_jobs(app: Celery, site: Site) -> None:
    cluster = cluster_of(app)
    for node_id in ("a@x", "b@x"):
        join(app, node_id)
    # They show no sign of life, so both are fenced. One comes back.
    for node_id, beat in cluster.epochs.beats().items():
        assert cluster.health.fail_over(node_id, beat, 3.2)
    assert {row["status"] for row in rows(site).values()} == {"lost"}
    join(app, "b@x")
    seen = wait_until(lambda: (now := rows(site))["b@x"]["status"] == "online" and now, END_S)
    assert seen["a@x"]["status"] == "lost"
    assert seen["a@x"]["moved"] == {"held": 0, "listed": 0}
    kinds = [event["kind"] for event in site.ask("/cluster/snapshot").told["events"]]
    assert sorted(kinds) == ["jobs moved", "jobs moved", "node lost", "node lost"]


def test_a_node_that_does_not_beat_is_silent_before_anybody_fences_it(app: Celery, site: Site) -> None:
    join(app, "a@x")
    assert rows(site)["a@x"]["status"] == "online"
    row = wait_until(lambda: (now := rows(site)["a@x"])["status"] == "silent" and now, END_S)
    assert row["silent_s"] > 2
    assert "no worker node is online" in site.ask("/cluster/snapshot").told["problems"]


def test_a_node_that_the_registry_does_not_know_is_shown(app: Celery, site: Site) -> None:
    cluster_of(app).epochs.open("a@x", ["llm"])
    assert rows(site)["a@x"]["status"] == "unregistered"


def test_jobs_that_nobody_serves_are_a_problem_that_is_told(app: Celery, site: Site) -> None:
    @app.task(base=ClusterTask, request_type="ocr", shared=False, ignore_result=True)
    def read() -> None:
        """Nobody runs it."""

    read.delay()
    told = site.ask("/cluster/snapshot").told
    assert told["waiting"] == {"waiting.ocr": 1}
    assert any("waiting.ocr" in problem for problem in told["problems"])


def test_what_the_cluster_says_reaches_the_page_as_data_only(app: Celery, site: Site) -> None:
    cluster = cluster_of(app)
    cluster.events.add(HOSTILE, node=HOSTILE, reason=HOSTILE)
    quarantine(app, HOSTILE, HOSTILE)
    answer = site.ask("/cluster/snapshot")
    assert answer.headers["Content-Type"] == "application/json; charset=UTF-8"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert [event["kind"] for event in answer.told["events"]] == ["job quarantined", HOSTILE]
    assert [job["id"] for job in answer.told["quarantine"]["jobs"]] == [HOSTILE]
    assert HOSTILE not in site.ask("/cluster").text


@pytest.mark.parametrize(
    "entry",
    [{"strange": "entry"}, {"kind": "node lost", "timestamp": "soon", "facts": "{}"},
     {"kind": "node lost", "timestamp": "nan", "facts": "{}"}, {"kind": "node lost", "timestamp": "1", "facts": "[1]"},
     {"kind": b"\xff", "timestamp": "1", "facts": "{}"}, {"kind": "node lost", "timestamp": "1", "facts": '{"a": NaN}'},
     {"kind": "node lost", "timestamp": "1e300", "facts": "{}"},
     {"kind": "node lost", "timestamp": "1", "facts": "null"},
     {"kind": "node lost", "timestamp": "1", "facts": "[" * 100_000}],
)  # fmt: skip
def test_an_entry_that_is_no_event_is_shown_as_one_and_hides_no_other(
    app: Celery, site: Site, entry: dict[str, str | bytes]
) -> None:
    cluster = cluster_of(app)
    cluster.events.add("node joined", node="a@x")
    cluster.client.xadd(cluster.keys.events, entry)
    cluster.events.add("node lost", node="a@x")
    told = site.ask("/cluster/snapshot").told["events"]
    assert [event["kind"] for event in told] == ["node lost", UNREADABLE, "node joined"]
    assert abs(told[1]["at"] - time.time()) < END_S
    read = cluster.events.after("0", 1)
    assert [event.kind for event in read] == ["node joined", UNREADABLE, "node lost"]
    assert cluster.events.after(read[1].id, 1) == read[2:]


def test_a_snapshot_holds_no_arguments_and_reads_a_job_once(app: Celery, site: Site) -> None:
    quarantine(app, "j")
    job = site.ask("/cluster/snapshot").told["quarantine"]["jobs"][0]
    assert set(job) == {"id", "task", "at", "crashes", "reason", "retry_of"}
    # Gone from under it: what was read is what is shown, as long as the job is listed.
    cluster = cluster_of(app)
    cluster.client.delete(cluster.keys.quarantine)
    wait_until(lambda: _taken_anew(site), END_S)
    assert [job["id"] for job in site.ask("/cluster/snapshot").told["quarantine"]["jobs"]] == ["j"]


def _taken_anew(site: Site) -> bool:
    first = site.ask("/cluster/snapshot").told["at"]
    return bool(wait_until(lambda: site.ask("/cluster/snapshot").told["at"] > first, END_S))


def test_many_who_look_share_one_snapshot(app: Celery, site: Site) -> None:
    cluster = cluster_of(app)
    join(app, "a@x")
    site.ask("/cluster/snapshot")
    asked = lambda: int(cluster.client.info("commandstats")["cmdstat_xrevrange"]["calls"])  # noqa: E731
    before, began_s = asked(), time.monotonic()
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: site.ask("/cluster/snapshot"), range(100)))
    took_s = time.monotonic() - began_s
    assert {answer.status for answer in answers} == {200}
    # One in FRESH_S, for as long as a busy machine needs for them all; one may read both streams.
    assert asked() - before <= 2 * (2 + took_s / FRESH_S)


def test_a_snapshot_is_compressed_for_whoever_can_read_that(app: Celery, site: Site) -> None:
    for number in range(200):
        join(app, f"gpu{number}@x")
    answer = site.ask("/cluster/snapshot", Accept_Encoding="gzip, br")
    assert answer.headers["Content-Encoding"] == "gzip"
    assert len(json.loads(gzip.decompress(answer.body))["nodes"]) == 200
    assert len(answer.body) < 20_000
    assert "Content-Encoding" not in site.ask("/cluster/snapshot").headers


# What is done


def test_a_node_is_drained_and_resumed(app: Celery, site: Site) -> None:
    cluster = cluster_of(app)
    join(app, "a@x")
    assert site.post("/cluster/nodes/a@x/drain").told == {"node": "a@x", "handed_over": 0}
    assert rows(site)["a@x"]["status"] == "draining", "the next snapshot knows it"
    assert site.post("/cluster/nodes/a@x/resume").told == {"node": "a@x"}
    assert rows(site)["a@x"]["status"] == "online"
    assert not cluster.epochs.lists().draining


def test_a_job_in_quarantine_is_sent_again_or_dropped(app: Celery, site: Site) -> None:
    cluster = cluster_of(app)
    for job_id in ("j", "a/b %2F<c>"):
        quarantine(app, job_id)
    told = site.post("/cluster/quarantine/j/retry").told
    assert told["job"] == "j"
    assert told["sent_as"] != "j"
    assert cluster.epochs.lengths() == {"waiting.llm": 1}
    assert site.post("/cluster/quarantine/a%2Fb%20%252F%3Cc%3E/drop").told == {"job": "a/b %2F<c>"}
    assert cluster.quarantine.count() == 0


@pytest.mark.parametrize(
    ("path", "status", "named"),
    [
        ("/cluster/nodes/aa@x/drain", 404, "did you mean 'a@x'"),
        ("/cluster/nodes/aa@x/resume", 404, "did you mean 'a@x'"),
        ("/cluster/nodes/boss@x/drain", 409, "boss@x is a coordinator"),
        ("/cluster/nodes/boss@x/resume", 409, "boss@x is a coordinator"),
        ("/cluster/nodes/a%20%2F/drain", 400, "node id"),
        ("/cluster/quarantine/k/retry", 404, "'k'"),
        ("/cluster/quarantine/k/drop", 404, "'k'"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_reason(
    app: Celery, site: Site, path: str, status: int, named: str
) -> None:
    join(app, "a@x")
    join(app, "boss@x", NodeRole.MASTER)
    answer = site.post(path)
    assert (answer.status, set(answer.told)) == (status, {"error"})
    assert named in answer.told["error"]


# Who may


@pytest.mark.parametrize("path", ACTIONS)
def test_nothing_is_done_without_the_token_of_the_page(app: Celery, site: Site, path: str) -> None:
    join(app, "a@x")
    quarantine(app, "j")
    for headers in ({}, {"Cookie": "_xsrf=abc"}, {"Cookie": "_xsrf=abc", "X_XSRFToken": "abd"}):
        answer = site.ask(path, "POST", Content_Length="0", **headers)
        assert answer.status == 403
        assert "error" in answer.told
    assert site.ask(path).status in (404, 405), "by POST only"
    assert not cluster_of(app).epochs.lists().draining
    assert cluster_of(app).quarantine.ids() == ["j"]


def test_a_page_of_others_cannot_ask_even_with_a_token(app: Celery) -> None:
    join(app, "a@x")
    with flower_site(app, basic_auth=[PASSWORD]) as site:
        for headers in ({"Origin": "http://evil.example"}, {"Sec_Fetch_Site": "cross-site"}):
            assert site.post("/cluster/nodes/a@x/drain", Authorization=LOGIN, **headers).status == 403
        assert site.post("/cluster/nodes/a@x/drain", Authorization=LOGIN).status == 200


def test_the_page_is_behind_flowers_password(app: Celery) -> None:
    join(app, "a@x")
    with flower_site(app, basic_auth=[PASSWORD]) as site:
        for path in ("/cluster", "/cluster/snapshot"):
            answer = site.ask(path)
            assert answer.status == 401
            assert answer.headers["WWW-Authenticate"].startswith("Basic")
            assert b"a@x" not in answer.body
            assert site.ask(path, Authorization=LOGIN).status == 200
        for path in ACTIONS:
            token = "ab" * 16
            answer = site.ask(path, "POST", Content_Length="0", Cookie=f"_xsrf={token}", X_XSRFToken=token)
            assert answer.status == 401


def test_the_page_is_behind_flowers_login(app: Celery) -> None:
    join(app, "a@x")
    with flower_site(app, auth=".*@here") as site:
        assert site.ask("/cluster").status == 302
        assert site.ask("/cluster").headers["Location"].startswith("/login?next=")
        assert site.ask("/cluster/snapshot").status == 403, "a script is sent to no form"


def test_who_has_logged_in_may(app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    join(app, "a@x")
    monkeypatch.setitem(urls.settings, "cookie_secret", "s" * 64)
    users = {name: f'user="{create_signed_value("s" * 64, "user", name).decode()}"' for name in ("a@here", "b@there")}
    with flower_site(app, auth=".*@here") as site:
        assert site.ask("/cluster/snapshot", Cookie=users["a@here"]).status == 200
        assert site.ask("/cluster/snapshot", Cookie=users["b@there"]).status == 403
        assert site.ask("/cluster/nodes/a@x/drain", "POST", Cookie=users["a@here"], Content_Length="0").status == 403
        assert site.post("/cluster/nodes/a@x/drain", Cookie=users["a@here"]).status == 200


@pytest.mark.parametrize(
    "host", ["127.0.0.1:5555", "192.168.0.7", "[::1]:5555", "[fe80::7]", "localhost:5555", "LOCALHOST", gethostname()]
)
def test_without_a_login_this_host_is_asked_by_address_or_name(app: Celery, site: Site, host: str) -> None:
    join(app, "a@x")
    assert site.ask("/cluster/snapshot", Host=host).status == 200
    assert site.post("/cluster/nodes/a@x/drain", Host=host).status == 200


@pytest.mark.parametrize("host", ["evil.example:5555", "127.0.0.1.evil.example", "localhost.evil.example", "1.2.3"])
def test_without_a_login_a_name_that_anybody_may_lead_here_is_refused(app: Celery, site: Site, host: str) -> None:
    join(app, "a@x")
    quarantine(app, "j")
    answers = [site.ask("/cluster/snapshot", Host=host), *(site.post(path, Host=host) for path in ACTIONS)]
    assert {answer.status for answer in answers} == {403}
    assert all("give it a login" in answer.told["error"] for answer in answers)
    assert not cluster_of(app).epochs.lists().draining
    assert cluster_of(app).quarantine.ids() == ["j"]


def test_with_a_login_any_name_will_do(app: Celery) -> None:
    join(app, "a@x")
    with flower_site(app, basic_auth=[PASSWORD]) as site:
        at_home = {"Host": "flower.example", "Authorization": LOGIN}
        assert site.ask("/cluster/snapshot", **at_home).status == 200
        assert site.post("/cluster/nodes/a@x/drain", **at_home).status == 200


def test_behind_a_proxy_that_asks_for_the_login_any_name_will_do(
    app: Celery, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOWER_UNAUTHENTICATED_API", "true")
    join(app, "a@x")
    assert site.post("/cluster/nodes/a@x/drain", Host="flower.example").status == 200


def test_a_flower_that_is_read_only_does_nothing_and_offers_nothing(app: Celery) -> None:
    join(app, "a@x")
    with flower_site(app, read_only=True) as site:
        assert "data-read-only" in site.ask("/cluster").text
        answer = site.post("/cluster/nodes/a@x/drain")
        assert (answer.status, answer.told) == (403, {"error": "Flower is in read-only mode"})
        assert site.ask("/cluster/snapshot").status == 200
    assert not cluster_of(app).epochs.lists().draining


# The page


def test_every_page_of_flower_has_the_entry_in_its_menu(site: Site) -> None:
    for path in ("/workers", "/tasks", "/cluster"):
        assert site.ask(path).text.count('href="/cluster"') == 1, path
    menu = site.ask("/cluster").text
    assert 'aria-current="page">Cluster</a>' in menu
    assert menu.index(">Broker</a>") < menu.index(">Cluster</a>")


def test_a_menu_that_is_another_one_is_left_as_it_is() -> None:
    assert add_entry("<ul></ul>") == "<ul></ul>"


def test_the_page_and_its_files_work_behind_a_prefix(app: Celery) -> None:
    with flower_site(app, url_prefix="flower") as site:
        page = site.ask("/cluster").text
        assert 'href="/flower/cluster"' in page
        assert 'data-base="/flower/cluster"' in page
        assert 'src="/flower/cluster/static/cluster.js"' in page
        script = site.ask("/cluster/static/cluster.js")
        assert (script.status, script.headers["Cache-Control"]) == (200, "no-cache")
        assert site.ask("/cluster/snapshot").status == 200


def test_the_page_needs_no_other_server_and_cannot_be_framed(site: Site) -> None:
    page = site.ask("/cluster")
    assert "frame-ancestors 'self'" in page.headers["Content-Security-Policy"]
    loaded = [part.partition('"')[0] for part in page.text.split('src="')[1:]]
    assert loaded
    assert all(address.startswith("/") for address in loaded)


@pytest.mark.parametrize("path", ["/cluster/static/../nodes.py", "/cluster/static/%2e%2e/nodes.py", "/cluster/static/"])
def test_nothing_but_the_pages_files_is_served(site: Site, path: str) -> None:
    assert site.ask(path).status in (403, 404)


# Outages


def test_an_outage_of_redis_is_told_and_is_over_with_it(app: Celery, site: Site, redis_server: RedisServer) -> None:
    join(app, "a@x")
    assert site.ask("/cluster/snapshot").status == 200
    redis_server.stop()
    answer = wait_until(lambda: (now := site.ask("/cluster/snapshot")).status == 503 and now, END_S)
    assert "connect" in answer.told["error"].lower()
    assert site.ask("/cluster").status == 200, "the page itself needs no Redis"
    assert site.post("/cluster/nodes/a@x/drain").status == 503
    redis_server.start()
    wait_until(lambda: site.ask("/cluster/snapshot").status == 200, END_S, "it goes on by itself")


def test_the_server_goes_on_while_redis_is_silent(app: Celery, site: Site) -> None:
    taken = site.ask("/cluster/snapshot").told["at"]
    # Whoever asks from now on asks Redis.
    time.sleep(FRESH_S)
    cluster_of(app).client.client_pause(4000, all=True)
    asking = threading.Thread(
        target=lambda: wait_until(lambda: site.ask("/cluster/snapshot").told["at"] > taken, END_S)
    )
    asking.start()
    served = 0
    while asking.is_alive():
        assert site.ask("/cluster/static/cluster.css").status == 200
        served += asking.is_alive()
        asking.join(0.1)
    assert served >= 5
