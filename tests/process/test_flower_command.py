"""``celery -A APP flower`` has the cluster page, if the app is in a cluster."""

from __future__ import annotations

import http.client
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from tests.flower import Site
from tests.waiting import wait_until
from workers.redis_server import free_port

ROOT = Path(__file__).parents[2]
END_S = 120.0


def command_line(app: str, *options: str) -> list[str]:
    return [sys.executable, "-m", "celery", "-A", app, "flower", "--address=127.0.0.1", *options]


@contextmanager
def started(app: str, directory: Path, *options: str, prefix: str = "", **environ: str) -> Iterator[Site]:
    """Run the command until it has answered, and for as long as the test asks."""
    port, log = free_port(), directory / "flower.log"
    path = os.pathsep.join((str(ROOT), str(directory)))
    with log.open("wb") as output, subprocess.Popen(
        command_line(app, f"--port={port}", *options), stdout=output, stderr=output, cwd=directory,
        env={**os.environ, "PYTHONPATH": path, **environ},
    ) as process:  # fmt: skip
        try:
            site = Site(port, prefix)

            def answers() -> bool:
                assert process.poll() is None, log.read_text()
                try:
                    return site.ask("/workers").status in (200, 401)
                except (OSError, http.client.HTTPException):
                    return False

            wait_until(answers, END_S, "Flower answers")
            yield site
        finally:
            process.terminate()


def test_the_page_is_in_the_flower_of_an_app_that_is_in_a_cluster(redis_url: str, tmp_path: Path) -> None:
    environ: dict[str, Any] = {"CLUSTER_BROKER_URL": redis_url, "FLOWER_BASIC_AUTH": "anna:secret"}
    with started("tests.process.jobs", tmp_path, "--url-prefix=f", prefix="/f", **environ) as site:
        assert site.ask("/cluster").status == 401
        login = {"Authorization": "Basic YW5uYTpzZWNyZXQ="}
        assert 'href="/f/cluster"' in site.ask("/workers", **login).text
        assert site.ask("/cluster", **login).status == 200
        assert site.ask("/cluster/snapshot", **login).told["nodes"] == []


def test_the_flower_of_an_app_without_a_cluster_is_as_it_was(redis_url: str, tmp_path: Path) -> None:
    (tmp_path / "plain.py").write_text(f"import celery\napp = celery.Celery('plain', broker={redis_url!r})\n")
    with started("plain", tmp_path) as site:
        assert "Cluster</a>" not in site.ask("/workers").text
        assert site.ask("/cluster").status == 404


def test_a_wrong_setting_is_told_in_a_line(redis_url: str) -> None:
    environ = {**os.environ, "CLUSTER_BROKER_URL": redis_url, "CLUSTER_STRATEGY": "best"}
    done = subprocess.run(
        command_line("tests.process.jobs", f"--port={free_port()}"), env=environ, cwd=ROOT, capture_output=True,
        text=True, timeout=END_S, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "cluster_strategy" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("first", [0, 1])
def test_it_does_not_matter_which_entry_point_is_loaded_first(first: int) -> None:
    of_this_name = [each for each in entry_points(group="celery.commands") if each.name == "flower"]
    values = sorted({each.value for each in of_this_name})
    assert values == ["cluster_tasks.flower.command:flower", "flower.command:flower"]
    modules = [value.partition(":")[0] for value in (values[::-1] if first else values)]
    program = f"from importlib import import_module as load; a, b = map(load, {modules}); assert a.flower is b.flower"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=END_S, cwd=ROOT)
