"""The files that deploy a cluster say what works: checked by reading them, and by asking the commands in them."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from celery.app.defaults import SETTING_KEYS
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from cluster_tasks.addresses.consul import parse_consul_url
from cluster_tasks.settings import CONF_PREFIX, ENV_PREFIX, ClusterSettings, load_settings

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILE = [
    line.partition(" ")[::2]
    for line in (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    if line and not line.startswith("#")
]


def instructions(name: str) -> list[str]:
    return [arguments for instruction, arguments in DOCKERFILE if instruction == name]


def celery_commands() -> list[list[str]]:
    written = [shlex.split(each["command"]) for each in SERVICES.values() if isinstance(each.get("command"), str)]
    written += [json.loads(arguments) for arguments in instructions("CMD")]
    return [words for words in written if words[0] == "celery"]


# docker-compose.yml


def test_the_deployment_has_a_redis_a_coordinator_workers_and_flower() -> None:
    assert {name for name, service in SERVICES.items() if "profiles" not in service} == {
        "redis", "cache", "coordinator", "worker", "flower",
    }  # fmt: skip


def test_every_published_port_is_bound_to_the_loopback() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert ports
    assert all(str(port).startswith("127.0.0.1:") for port in ports)


def test_flower_asks_for_a_password_only_if_the_shell_has_one() -> None:
    flower = SERVICES["flower"]
    assert flower["environment"]["FLOWER_BASIC_AUTH"] is None
    assert "basic" not in flower["command"]


def test_the_profile_with_consul_is_one_that_the_nodes_can_be_pointed_at() -> None:
    consul = SERVICES["consul"]
    assert consul["profiles"] == ["consul"]
    assert SERVICES["worker"]["environment"]["CLUSTER_REGISTRY_URL"] == "${CLUSTER_REGISTRY_URL:-}"
    (told,) = re.findall(r"CLUSTER_REGISTRY_URL=(\S+) docker compose", (ROOT / "docker-compose.yml").read_text())
    assert parse_consul_url(told).host == "consul"
    assert any("consul" in re.findall(r"\w+", command) for command in instructions("RUN") if "pip install" in command)


def test_redis_keeps_the_jobs_over_a_restart_and_throws_none_away() -> None:
    command = SERVICES["redis"]["command"]
    assert "--appendonly yes" in command
    assert "--maxmemory-policy noeviction" in command
    assert SERVICES["redis"]["volumes"] == ["redis:/data"]


def test_the_cache_has_a_redis_of_its_own_that_forgets_and_that_nobody_waits_for() -> None:
    assert "--maxmemory-policy allkeys-lru" in SERVICES["cache"]["command"]
    assert "--maxmemory " in SERVICES["cache"]["command"]
    assert not SERVICES["cache"].keys() & {"ports", "volumes"}
    assert SERVICES["worker"]["environment"]["CLUSTER_CACHE_URL"] == "${CLUSTER_CACHE_URL-redis://cache:6379/0}"
    assert all("cache" not in service.get("depends_on", {}) for service in SERVICES.values())
    text = " ".join((ROOT / "docker-compose.yml").read_text().replace("#", "").split())
    (told,) = re.findall(r"CLUSTER_CACHE_URL=(\S+) docker compose --profile", text)
    hosts = load_settings({"cluster_cache_url": told}, {}).cache_url
    assert hosts is not None
    named = set(re.findall(r"[\w-]+(?=:6379)", hosts.get_secret_value()))
    assert len(named) == 3
    assert named < SERVICES.keys()


def test_nodes_wait_until_redis_answers() -> None:
    assert "healthcheck" in SERVICES["redis"]
    for name in ("coordinator", "worker", "flower"):
        assert SERVICES[name]["depends_on"]["redis"]["condition"] == "service_healthy"


def test_workers_can_be_scaled() -> None:
    worker = SERVICES["worker"]
    assert not worker.keys() & {"container_name", "hostname", "ports"}
    assert "@%h" in worker["command"]


def test_workers_share_a_volume_for_their_collections() -> None:
    assert "data:/data" in SERVICES["worker"]["volumes"]
    assert "data" in COMPOSE["volumes"]
    assert "CLUSTER_DATA_DIR=/data" in " ".join(instructions("ENV"))


def test_a_stopped_worker_has_time_to_drain() -> None:
    drain_s = load_settings(configuration(), {}).drain_timeout_s
    assert int(SERVICES["worker"]["stop_grace_period"].removesuffix("s")) > drain_s


def test_every_variable_is_a_setting() -> None:
    given = {name for service in SERVICES.values() for name in service.get("environment", {})}
    named = {name for name in given if name.startswith(ENV_PREFIX)}
    assert named
    assert {name.removeprefix(ENV_PREFIX).lower() for name in named} <= ClusterSettings.model_fields.keys()


def test_the_redis_cluster_starts_by_its_profile_only() -> None:
    nodes = [name for name in SERVICES if re.fullmatch(r"cache-\d", name)]
    assert len(nodes) == 6
    assert all(SERVICES[name]["profiles"] == ["redis-cluster"] for name in [*nodes, "cache-init"])
    assert SERVICES["cache-init"]["environment"]["NODES"].split() == nodes
    assert list(SERVICES["cache-init"]["depends_on"]) == nodes


def test_the_script_that_joins_the_redis_cluster_can_be_parsed() -> None:
    *_, script = SERVICES["cache-init"]["command"]
    subprocess.run(["bash", "-n"], input=script.replace("$$", "$"), text=True, check=True)
    assert "$" not in script.replace("$$", ""), "a single $ is taken by compose"


# The commands in both


@pytest.mark.parametrize("words", celery_commands(), ids=" ".join)
def test_a_command_exists_with_its_options(words: list[str], tmp_path: Path) -> None:
    options = [word.partition("=")[0] for word in words[3:] if word.startswith("-")]
    names = [word for word in words[3 : 5 if "coordinator" in words else 4] if not word.startswith("-")]
    asked = subprocess.run(
        [sys.executable, "-m", *words[:3], *names, "--help"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert asked.returncode == 0, asked.stderr
    assert f"Usage: python -m celery {' '.join(names)}" in asked.stdout
    if names != ["flower"]:  # Its options are Tornado's, and --help tells none.
        assert all(re.search(rf"{option}\b", asked.stdout) for option in options)


# Dockerfile


def test_the_image_does_not_run_as_root() -> None:
    assert instructions("USER") == ["cluster"]


def test_the_images_python_is_one_that_the_package_takes() -> None:
    (base,) = instructions("FROM")
    version = re.search(r"python:(3\.\d+)", base)
    assert version
    assert Version(version[1]) in Requirement(f"x{PROJECT['requires-python']}").specifier


def test_what_the_image_copies_exists_and_is_not_ignored() -> None:
    copied = [source for arguments in instructions("COPY") for source in arguments.split()[:-1]]
    ignored = (ROOT / ".dockerignore").read_text().split()
    for source in copied:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in ignored


def test_the_image_installs_extras_that_exist() -> None:
    (extras,) = re.findall(r"\"\.\[([\w,-]+)\]\"", " ".join(instructions("RUN")))
    assert set(extras.split(",")) <= PROJECT["optional-dependencies"].keys()


# celeryconfig.py


def configuration() -> dict[str, Any]:
    scope: dict[str, Any] = {}
    exec(compile((ROOT / "celeryconfig.py").read_text(), "celeryconfig.py", "exec"), scope)
    return {name: value for name, value in scope.items() if not name.startswith("__")}


def test_celeryconfig_holds_settings_only() -> None:
    own = {name for name in configuration() if name.startswith(CONF_PREFIX)}
    assert own
    assert configuration().keys() - own <= SETTING_KEYS


def test_the_clusters_settings_in_celeryconfig_are_valid() -> None:
    load_settings(configuration(), {})


def test_what_celeryconfig_offers_behind_a_hash_is_valid_too() -> None:
    offered = re.findall(r"^# (cluster_\w+) = (.+?)(?:  #.*)?$", (ROOT / "celeryconfig.py").read_text(), re.MULTILINE)
    assert len(offered) > 5
    load_settings({name: ast.literal_eval(value) for name, value in offered}, {})


def test_celeryconfig_of_the_current_folder_is_read_where_the_package_is_installed(tmp_path: Path) -> None:
    installed = tmp_path / "site-packages"
    installed.mkdir()
    for package in ("cluster_tasks", "workers"):
        (installed / package).symlink_to(ROOT / package)
    (tmp_path / "celeryconfig.py").write_text("cluster_lease_s = 7.0\n", encoding="utf-8")
    asked = (
        "import sys;"
        f"sys.path = [path for path in sys.path if path != {str(ROOT)!r}] + [{str(installed)!r}];"
        "from celery.app.utils import find_app;"
        "print(find_app('cluster_tasks').conf.cluster_lease_s)"
    )
    # Without the current folder on the path, as the program celery is.
    told = subprocess.run([sys.executable, "-P", "-c", asked], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert told.stdout == "7.0\n"


def test_celeryconfig_has_every_setting_but_those_that_belong_into_variables() -> None:
    text = (ROOT / "celeryconfig.py").read_text()
    for name in ClusterSettings.model_fields:
        assert f"{CONF_PREFIX}{name} = " in text or f"``{ENV_PREFIX}{name.upper()}``" in text, name


def test_nothing_is_pickled() -> None:
    settings = configuration()
    assert {settings["task_serializer"], settings["result_serializer"], *settings["accept_content"]} == {"json"}


# The package


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    directory = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", directory],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (built,) = directory.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        return archive.namelist()


def test_the_wheel_holds_the_two_packages_and_nothing_else(wheel: list[str]) -> None:
    top = {name.partition("/")[0] for name in wheel}
    assert {name for name in top if not name.endswith(".dist-info")} == {"cluster_tasks", "workers"}


def test_the_wheel_holds_all_that_the_packages_read(wheel: list[str]) -> None:
    sources = [path for package in ("cluster_tasks", "workers") for path in (ROOT / package).rglob("*")]
    read = {str(path.relative_to(ROOT)) for path in sources if path.is_file() and path.suffix != ".pyc"}
    assert {"cluster_tasks/py.typed", "cluster_tasks/flower/static/cluster.js"} <= read
    assert read <= set(wheel)


def test_constraints_are_names_and_versions_only() -> None:
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert re.fullmatch(r"[A-Za-z0-9_.-]+==[\w.]+", line), line


def test_every_requirement_admits_the_version_that_was_tested() -> None:
    lines = (line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
    tested = {canonicalize_name(name): version for name, version in lines}
    required = [
        *PROJECT["dependencies"],
        *(line for extra in PROJECT["optional-dependencies"].values() for line in extra),
    ]
    for requirement in map(Requirement, required):
        if requirement.name != PROJECT["name"]:
            assert tested[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_the_checks_of_a_change_can_be_run() -> None:
    assert os.access(ROOT / ".ci/run", os.X_OK)
    subprocess.run(["bash", "-n", ROOT / ".ci/run"], check=True)
