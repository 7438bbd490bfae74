"""Where the demo lives: a folder and a cluster of its own, of which nothing stays, however it ends."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path

from celery.backends.redis import RedisBackend

from cluster_tasks.clock import SystemClock
from cluster_tasks.keys import Keys
from cluster_tasks.redis_store import connect
from cluster_tasks.registry import create_registry
from cluster_tasks.settings import ENV_PREFIX
from workers.demo.record import EXECUTED, Record
from workers.local import LocalCluster, Plan

KEPT = {"CLUSTER_BROKER_URL", "CLUSTER_SENTINEL_MASTER", "CLUSTER_REGISTRY_URL"}
DEFAULTS = '"""The demo runs with the defaults, whatever is set elsewhere."""\n'

# Deletes a folder when the process at the other end of the pipe is gone; its dying nodes may still write.
_CLEANER = """
import shutil, sys, time
sys.stdin.read()
for _ in range(30):
    shutil.rmtree(sys.argv[1], ignore_errors=True)
    time.sleep(0.1)
"""


@contextmanager
def own_cluster(nodes: int, strategy: str, flower_port: int) -> Iterator[LocalCluster]:
    """Start a cluster with nothing of the caller's but a Redis and a registry, on which it takes a name of its own.

    Nodes that die stay dead, so that others must do their work. Raises as ``LocalCluster.start`` does.
    """
    for variable in [name for name in os.environ if name.startswith(ENV_PREFIX) and name not in KEPT]:
        del os.environ[variable]
    broker_url, registry_url = (os.environ.get(f"{ENV_PREFIX}{kind}_URL", "") for kind in ("BROKER", "REGISTRY"))
    if broker_url or registry_url:
        os.environ["CLUSTER_NAME"] = f"demo-{secrets.token_hex(4)}"
    with _passing_folder() as folder, chdir(folder):
        # Found before any other celeryconfig: here by the path, in the nodes by their current folder.
        (folder / "celeryconfig.py").write_text(DEFAULTS, encoding="utf-8")
        sys.path.insert(0, str(folder))
        plan = Plan(folder, nodes, "workers.audit", strategy=strategy, flower_port=flower_port, restart=False,
                    broker_url=broker_url)  # fmt: skip
        try:
            with LocalCluster(plan) as local:
                yield local
        finally:
            if broker_url:
                _delete_keys(broker_url, os.environ["CLUSTER_NAME"])
            if registry_url:
                keys = Keys(os.environ["CLUSTER_NAME"])
                create_registry(registry_url, broker_url=broker_url, keys=keys, clock=SystemClock()).erase()


@contextmanager
def _passing_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="cluster-demo-") as folder:
        command = [sys.executable, "-I", "-S", "-c", _CLEANER, folder]
        with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, cwd="/") as cleaner:
            try:
                yield Path(folder)
            finally:
                cleaner.kill()


def _delete_keys(broker_url: str, name: str) -> None:
    with connect(broker_url) as client:
        jobs = {entry.job_id for entry in Record(client, Keys(name)).read(EXECUTED)}
        results = [f"{RedisBackend.task_keyprefix.decode()}{job_id}" for job_id in jobs]
        own = [key for start in ("", "_kombu.binding.") for key in client.scan_iter(f"{start}{name}[:.]*", count=1000)]
        if keys := [*results, *own]:
            client.unlink(*keys)
