"""Every command of docs/deployment.md, run as it stands: in a network of its own, where its ports are free."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.partitions import can_make_namespaces
from tests.servers import missing

GUIDE = (Path(__file__).parents[2] / "docs" / "deployment.md").read_text(encoding="utf-8")
SET_UPS = dict(re.findall(r"^## (.+?)\n(?:(?!^## ).)*?^```sh\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL))
NEEDS = {"Redis only": "redis-server", "Consul": "consul", "etcd": "etcd"}
LIMIT_S = 120


def as_a_reader_does(commands: str) -> str:
    """Return a script that goes on when a command has done its work: what was started before may need a while."""
    script = ["set -u", 'again() { until "$@" > told 2>&1; do sleep 0.5; done; echo "+ $*"; cat told; }']
    for line in commands.splitlines():
        goes_on_by_itself = line.endswith("&") or line.startswith("export ")
        script.append(line if goes_on_by_itself else f"again {line}")
    return "\n".join(script)


def test_the_guide_has_a_set_up_for_each_registry_and_nothing_else_to_run() -> None:
    assert SET_UPS.keys() == NEEDS.keys()
    assert GUIDE.count("```sh") == len(SET_UPS)


@pytest.mark.timeout(LIMIT_S + 60)
@pytest.mark.parametrize("name", NEEDS)
def test_a_set_up_of_the_guide_works_as_it_stands(name: str, tmp_path: Path) -> None:
    for program in ("redis-server", NEEDS[name], "unshare", "ip"):
        if shutil.which(program) is None:
            missing(f"{program} is not installed: the guide's commands need it")
    if not can_make_namespaces():
        pytest.skip("without the right to make a network, the ports of the guide may be others'")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environ = {**os.environ, "PATH": path, "HOME": str(tmp_path)}
    script = f"ip link set lo up\n{as_a_reader_does(SET_UPS[name])}"
    # Whatever it started ends with it.
    within = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
    log = tmp_path / "log"
    with log.open("wb") as output:
        command = [*within, "timeout", str(LIMIT_S), "bash", "-c", script]
        done = subprocess.run(command, env=environ, cwd=tmp_path, stdout=output, stderr=output, check=False)
    told = log.read_text(errors="replace")
    assert done.returncode == 0, told
    assert re.search(r"^health\s+healthy", told, re.MULTILINE), told
    if name == "Consul":
        assert re.search(r"^cluster-tasks\s.*worker", told, re.MULTILINE), told
    if name == "etcd":
        assert re.search(r"^gpu1@\S+\s+online", told, re.MULTILINE), told
