"""The top-level package ``workers`` is ours, or no node starts and it is said which one is in its place."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
END_S = 120.0
APP = """
from celery import Celery
from cluster_tasks import Cluster
app = Celery("shop", include=["workers.tasks"])
Cluster(app)
"""


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run Celery's program as it is installed: the current folder is not on its path."""
    return subprocess.run(
        [sys.executable, "-P", "-m", "celery", *words], env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=folder,
        capture_output=True, text=True, timeout=END_S, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("workers/__init__.py", "-A workers worker"),
        ("workers/__init__.py", "-A workers cluster coordinator"),
        ("shop.py", "-A shop worker"),
    ],
)
def test_a_package_of_the_users_of_that_name_is_named(tmp_path: Path, module: str, words: str) -> None:
    (tmp_path / "workers").mkdir()
    for each in ("__init__.py", "tasks.py"):
        (tmp_path / "workers" / each).touch()
    (tmp_path / module).write_text(APP)
    done = run(tmp_path, *words.split())
    assert done.returncode == 1
    assert f"Python finds {tmp_path}/workers/__init__.py: rename the other package" in done.stderr
    assert "Traceback" not in done.stderr
