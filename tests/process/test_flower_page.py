"""The cluster page in a browser: what people see, while nodes die and Redis goes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from celery import Celery
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select

from cluster_tasks import Cluster, Node, cluster_of
from cluster_tasks.broker.placement import Crash
from cluster_tasks.model import Capacity
from tests.broker import make_message
from tests.browser import DESKTOP, PHONE, chromium, complaints, prefer, resize
from tests.flower import Site, flower_site
from tests.process.accounts import finish, held_key
from tests.process.conftest import NewWorker
from tests.process.jobs import Jobs
from tests.process.nodes import running
from tests.waiting import wait_until
from workers.redis_server import RedisServer

END_S = 120.0
HOSTILE = "<img src=x onerror=document.body.dataset.hurt=1>"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    with chromium(tmp_path_factory.mktemp("browser")) as page:
        yield page


@pytest.fixture
def page(browser: Chrome) -> Iterator[Chrome]:
    """An empty page on a desk, and no word of complaint in its console at the end."""
    resize(browser, DESKTOP)
    prefer(browser, "light")
    yield browser
    said = complaints(browser)
    browser.get("about:blank")
    # A server that is away is what some tests are about.
    assert [line for line in said if "Failed to load resource" not in line["message"]] == []


@pytest.fixture
def app(redis_url: str) -> Iterator[Celery]:
    with Celery("paged", set_as_current=False, broker=redis_url) as app:
        Cluster(app)
        yield app


@pytest.fixture
def site(app: Celery) -> Iterator[Site]:
    with flower_site(app) as site:
        yield site


def text_of(page: Chrome, where: str) -> str:
    return page.find_element(By.CSS_SELECTOR, where).text


def shown(page: Chrome, where: str) -> list[WebElement]:
    return [element for element in page.find_elements(By.CSS_SELECTOR, where) if element.is_displayed()]


def rows(page: Chrome) -> dict[str, dict[str, str]]:
    """The nodes as they are shown, in that order: what stands in each cell, and the colour of the status."""
    return dict(
        page.execute_script("""
            return [...document.querySelectorAll("#nodes > tr")].map((row) => [
              row.dataset.key,
              Object.fromEntries([...row.children].map((cell) => [cell.dataset.label || "actions", cell.textContent])
                .concat([["colour", getComputedStyle(row.querySelector(".cluster-badge")).color]])),
            ]);
        """)
    )


def press(page: Chrome, label: str, answer: str, meanwhile: Callable[[], object] = lambda: None) -> None:
    """Press a button by its name for screen readers, and answer the question that comes."""
    page.find_element(By.CSS_SELECTOR, f"[aria-label='{label}']").click()
    dialog = wait_until(lambda: shown(page, "dialog[open]"), END_S, "it asks")[0]
    assert label in dialog.text
    meanwhile()
    next(button for button in dialog.find_elements(By.TAG_NAME, "button") if button.text == answer).click()
    wait_until(lambda: not shown(page, "dialog[open]"), END_S, "it has its answer")


def is_red(colour: str) -> bool:
    red, green, blue = (float(part) for part in colour.partition("(")[2].rstrip(")").split(",")[:3])
    return red > 1.5 * max(green, blue)


class Crowd:
    """Nodes that beat, and do nothing else."""

    def __init__(self, app: Celery) -> None:
        self._cluster = cluster_of(app)
        self._epochs: dict[str, str] = {}

    def join(self, node_id: str, *serves: str, **metadata: str) -> None:
        """Let one join."""
        types = serves or ("llm",)
        epoch = self._epochs[node_id] = str(self._cluster.epochs.open(node_id, types))
        slots = Capacity(max_connections=4)
        node = Node(id=node_id, epoch=epoch, serves=frozenset(types), capacity=slots, metadata=metadata)
        self._cluster.registry.register(node)

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Have all beat meanwhile."""
        end = threading.Event()

        def beat() -> None:
            while not end.wait(0.3):
                for node_id, epoch in list(self._epochs.items()):
                    self._cluster.epochs.beat(node_id, epoch)

        thread = threading.Thread(target=beat)
        thread.start()
        try:
            yield
        finally:
            end.set()
            thread.join()


@pytest.mark.timeout(300)
def test_a_node_is_killed_and_the_page_shows_it_go_red_and_its_jobs_move(
    jobs: Jobs, new_worker: NewWorker, page: Chrome
) -> None:
    with running(*(new_worker(name) for name in "abc")) as (victim, *others), flower_site(jobs.app) as site:
        page.get(site.url)
        page.find_element(By.LINK_TEXT, "Cluster").click()
        everybody = {worker.id for worker in (victim, *others)}
        wait_until(lambda: rows(page).keys() == everybody, END_S, "all are shown")
        assert not any(is_red(row["colour"]) for row in rows(page).values())
        results = [jobs.work.delay(1.0, key=str(number)) for number in range(60)]
        wait_until(lambda: jobs.cluster.client.hlen(held_key(jobs, victim.id)), END_S, "the victim works")
        wait_until(lambda: rows(page)[victim.id]["Running"].startswith("2"), END_S, "that it works is shown")
        victim.kill()
        wait_until(lambda: is_red(rows(page)[victim.id]["colour"]), END_S, "it goes red")
        wait_until(lambda: "jobs moved" in rows(page)[victim.id]["Status"], END_S, "its jobs move")
        assert next(iter(rows(page))) == victim.id, "what needs somebody to look comes first"
        told = [event.text.partition("\n")[0] for event in page.find_elements(By.CSS_SELECTOR, "#events > li")]
        assert "node lost" in told
        assert told.index("jobs moved") < told.index("node lost"), "the latest first"
        assert told.count("node joined") == 3
        finish(results)
        with running(new_worker("a")):
            wait_until(lambda: rows(page)[victim.id]["Status"] == "online", END_S, "it is back")
        wait_until(lambda: victim.id not in rows(page), END_S, "one that leaves in good order is gone")


def test_a_node_is_drained_and_resumed_by_its_button(app: Celery, site: Site, page: Chrome) -> None:
    crowd, cluster = Crowd(app), cluster_of(app)
    crowd.join("a@x")
    with crowd.beating():
        page.get(f"{site.url}/cluster")
        wait_until(lambda: rows(page).get("a@x", {}).get("Status") == "online", END_S)
        press(page, "Drain a@x", "Cancel")
        assert not cluster.epochs.lists().draining
        press(page, "Drain a@x", "Drain")
        wait_until(lambda: rows(page)["a@x"]["Status"] == "draining", END_S)
        wait_until(lambda: "handed over: 0" in text_of(page, "#cluster-said"), END_S)
        press(page, "Resume a@x", "Resume")
        wait_until(lambda: rows(page)["a@x"]["Status"] == "online", END_S)
    assert not cluster.epochs.lists().draining


def test_a_job_in_quarantine_is_sent_again_or_dropped_by_its_buttons(app: Celery, site: Site, page: Chrome) -> None:
    quarantine = cluster_of(app).quarantine
    for job_id in ("first", "second"):
        quarantine.put(job_id, "jobs.bad", make_message(job_id, "llm"), [Crash("a@x", "1-a", "SIGKILL", time.time())])
    page.get(f"{site.url}/cluster")
    wait_until(lambda: text_of(page, "#metric-quarantine") == "2", END_S)
    press(page, "Retry first", "Retry")
    wait_until(lambda: text_of(page, "#metric-quarantine") == "1", END_S)
    assert cluster_of(app).epochs.lengths() == {"waiting.llm": 1}
    # Somebody else is faster.
    press(page, "Drop second", "Drop", meanwhile=lambda: quarantine.drop("second"))
    wait_until(lambda: "no job 'second' is in quarantine" in text_of(page, "#cluster-said"), END_S)
    wait_until(lambda: "No job is in quarantine." in text_of(page, "main"), END_S)


def test_what_the_cluster_says_is_shown_as_text(app: Celery, site: Site, page: Chrome) -> None:
    cluster = cluster_of(app)
    cluster.events.add("node lost", node=HOSTILE, epoch=HOSTILE, silent_s=HOSTILE)
    cluster.events.add(HOSTILE, **{HOSTILE: HOSTILE, "nested": [HOSTILE, {"a": HOSTILE}]})
    crash = Crash(HOSTILE, HOSTILE, HOSTILE, time.time())
    cluster.quarantine.put(HOSTILE, HOSTILE, make_message("j", "llm"), [crash])
    page.get(f"{site.url}/cluster")
    wait_until(lambda: shown(page, "#quarantine > tr"), END_S)
    for place in ("#quarantine", "#events", "#nodes"):
        assert HOSTILE in text_of(page, place), place
    assert not page.find_elements(By.CSS_SELECTOR, "#cluster-page img")
    page.find_element(By.CSS_SELECTOR, "#quarantine button").click()
    assert HOSTILE in text_of(page, "dialog")
    next(button for button in shown(page, "dialog button") if button.text == "Retry").click()
    wait_until(lambda: "is sent again" in text_of(page, "#cluster-said"), END_S)
    assert HOSTILE in text_of(page, "#cluster-said")
    assert page.execute_script("return document.body.dataset.hurt ?? null") is None


def test_two_hundred_nodes_are_sorted_and_filtered(app: Celery, site: Site, page: Chrome) -> None:
    crowd = Crowd(app)
    for number in range(1, 201):
        crowd.join(f"gpu{number}@x", "llm" if number % 2 else "embedding")
    cluster_of(app).epochs.set_draining("gpu77@x", True)
    with crowd.beating():
        page.get(f"{site.url}/cluster")
        wait_until(lambda: len(rows(page)) == 200, END_S)
        wait_until(lambda: {row["Status"] for row in rows(page).values()} == {"online", "draining"}, END_S)
        assert list(rows(page))[:4] == ["gpu77@x", "gpu1@x", "gpu2@x", "gpu3@x"]
        assert text_of(page, "#metric-nodes") == "199 / 200"
        page.find_element(By.CSS_SELECTOR, "[data-column=id] button").click()
        page.find_element(By.CSS_SELECTOR, "[data-column=id] button").click()
        assert next(iter(rows(page))) == "gpu200@x"
        head = page.find_element(By.CSS_SELECTOR, "[data-column=id]")
        assert head.get_attribute("aria-sort") == "descending"
        page.find_element(By.ID, "nodes-filter").send_keys("embedding 10")
        assert list(rows(page)) == ["gpu110@x", *(f"gpu{number}@x" for number in (108, 106, 104, 102, 100, 10))]
        assert text_of(page, "#nodes-count") == "7 of 200"
        page.find_element(By.ID, "nodes-filter").clear()
        Select(page.find_element(By.ID, "nodes-status")).select_by_value("draining")
        assert list(rows(page)) == ["gpu77@x"]


def test_zones_have_a_column_as_soon_as_a_node_is_in_one(app: Celery, site: Site, page: Chrome) -> None:
    crowd, column = Crowd(app), "[data-column=zone]"
    crowd.join("a@x")
    with crowd.beating():
        page.get(f"{site.url}/cluster")
        wait_until(lambda: len(rows(page)) == 1, END_S)
        assert not shown(page, column)
        crowd.join("b@x", zone="east")
        crowd.join("c@x", zone="west")
        wait_until(lambda: len(rows(page)) == 3, END_S)
        assert shown(page, column)
        assert [row["Zone"] for row in rows(page).values()][1:] == ["east", "west"]
        page.find_element(By.ID, "nodes-filter").send_keys("west")
        assert list(rows(page)) == ["c@x"]


def test_the_page_fits_a_phone(app: Celery, site: Site, page: Chrome) -> None:
    crowd = Crowd(app)
    crowd.join("a-node-whose-name-is-as-long-as-it-may-be" + "-and-longer" * 6 + "@some.host.example", "llm")
    cluster_of(app).events.add("x" * 200, reason="y" * 500)
    resize(page, PHONE)
    with crowd.beating():
        page.get(f"{site.url}/cluster")
        wait_until(lambda: len(rows(page)) == 1 and shown(page, "#events > li"), END_S)
        wide, whole = page.execute_script("return [innerWidth, document.documentElement.scrollWidth]")
        assert (wide, whole) == (360, 360)
        inner = "return [...document.querySelectorAll('.cluster-scroll')].every((each) => each.scrollWidth <= 360)"
        assert page.execute_script(inner)


def test_the_page_follows_the_theme_of_the_system_and_of_flower(app: Celery, site: Site, page: Chrome) -> None:
    page.get(f"{site.url}/cluster")
    card = "getComputedStyle(document.querySelector('.cluster-card')).backgroundColor"
    background = lambda: page.execute_script(f"return {card}")  # noqa: E731
    light = background()
    prefer(page, "dark")
    dark = wait_until(lambda: (now := background()) != light and now, END_S)
    page.find_element(By.ID, "theme-toggle").click()
    wait_until(lambda: shown(page, "[data-bs-theme-value=light]"), END_S)[0].click()
    wait_until(lambda: background() == light != dark, END_S)
    page.execute_script("localStorage.clear()")


def test_the_page_tells_of_an_outage_of_redis_and_recovers_by_itself(
    app: Celery, site: Site, page: Chrome, redis_server: RedisServer
) -> None:
    Crowd(app).join("a@x")
    page.get(f"{site.url}/cluster")
    wait_until(lambda: rows(page), END_S)
    assert text_of(page, "#cluster-live") == "Live"
    redis_server.stop()
    wait_until(lambda: "out of date" in text_of(page, "main"), END_S, "it says so")
    assert rows(page).keys() == {"a@x"}, "what was known stays in sight"
    redis_server.start()
    wait_until(lambda: text_of(page, "#cluster-live") == "Live", END_S, "it goes on")
    assert not shown(page, "#cluster-outage")


def test_a_page_that_loses_its_server_says_so(app: Celery, page: Chrome) -> None:
    with flower_site(app) as site:
        page.get(f"{site.url}/cluster")
        wait_until(lambda: text_of(page, "#cluster-live") == "Live", END_S)
    wait_until(lambda: "Flower does not answer" in text_of(page, "main"), END_S)


def test_a_page_that_is_read_only_has_no_buttons(app: Celery, page: Chrome) -> None:
    crowd = Crowd(app)
    crowd.join("a@x")
    with crowd.beating(), flower_site(app, read_only=True) as site:
        page.get(f"{site.url}/cluster")
        wait_until(lambda: rows(page).get("a@x", {}).get("Status") == "online", END_S)
        assert not page.find_elements(By.CSS_SELECTOR, "#nodes button")


def test_a_screen_reader_is_told_of_news_and_of_nothing_else(app: Celery, site: Site, page: Chrome) -> None:
    cluster_of(app).events.add("node joined", node="a@x", epoch="1-a")
    page.get(f"{site.url}/cluster")
    wait_until(lambda: shown(page, "#events > li"), END_S)
    assert page.find_element(By.ID, "events").get_attribute("aria-live") == "polite"
    first = page.find_element(By.CSS_SELECTOR, "#events > li")
    cluster_of(app).events.add("node left", node="a@x", epoch="1-a")
    wait_until(lambda: len(shown(page, "#events > li")) == 2, END_S)
    assert first.is_displayed(), "it is the element that was there"
    unnamed = """
        const named = (each) => each.textContent.trim() || each.getAttribute("aria-label") || each.labels?.length;
        return [...document.querySelectorAll("#cluster-page :is(button, input, select)")]
          .filter((each) => !named(each)).map((each) => each.outerHTML);
    """
    assert page.execute_script(unnamed) == []
