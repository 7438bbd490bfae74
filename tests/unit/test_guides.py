"""README.md and docs/ say what is so: their code can be parsed, and what they name exists.

What their blocks do when they are run is in tests/process/test_guides.py.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click
import markdown
import pytest
import yaml
from celery.bin.celery import celery as celery_command
from kombu.utils.imports import symbol_by_name
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort
from pydantic import SecretStr

from cluster_tasks.cli.cluster import cluster as cluster_command
from cluster_tasks.cli.main import COMMANDS, main
from cluster_tasks.settings import CONF_PREFIX, ENV_PREFIX, ClusterSettings
from tests.guides import BEGINNINGS, LANGUAGES, OPTIONS, PAGES, ROOT, Block, all_blocks, blocks_of, prose_of, sessions

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
BEHIND: dict[str, click.Command] = {name: symbol_by_name(place) for name, place in COMMANDS.items()}
"""What commands of cluster-tasks become, which have the options."""
SHELL = [block for block in all_blocks() if block.language == "sh"]
PYTHON = [block for block in all_blocks() if block.language == "python"]
NOT_SETTINGS = {"lease"}
"""What is misspelt on purpose, to show how that is told."""


def page_ids(page: Path) -> str:
    return page.name


# The fences


@pytest.mark.parametrize("page", PAGES, ids=page_ids)
def test_every_fence_is_one_that_the_tests_understand(page: Path) -> None:
    blocks = blocks_of(page)
    assert page.read_text(encoding="utf-8").count("\n```") == 2 * len(blocks), "a fence that is not read"
    for block in blocks:
        assert block.language in LANGUAGES, block
        assert block.options.keys() <= OPTIONS, block
        assert block.options.get("begin", "nothing") in BEGINNINGS, block
        assert block.options.get("stays", "yes") == "yes", block
        assert block.options.get("norun", "why"), f"{block} does not say why it is not run"


def test_a_file_that_a_reader_writes_is_there_when_it_is_used() -> None:
    used = {str(block) for session in sessions() for block in session.blocks}
    assert {str(block) for block in all_blocks() if block.options.get("title", "").endswith(".py")} <= used


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_can_be_parsed(block: Block) -> None:
    ast.parse(block.text, filename=str(block))


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_shell_can_be_parsed(block: Block) -> None:
    done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("block", [block for block in all_blocks() if block.language in ("json", "yaml")], ids=str)
def test_data_can_be_parsed(block: Block) -> None:
    (json.loads if block.language == "json" else yaml.safe_load)(block.text)


def test_the_site_shows_every_fence_as_code() -> None:
    config = load_config(str(ROOT / "mkdocs.yml"))
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        made = markdown.markdown(text, extensions=config.markdown_extensions, extension_configs=config.mdx_configs)
        assert len(re.findall(r'<div class="(?:language-\w+ )?highlight">', made)) == len(blocks_of(page)), page.name
        assert "```" not in made, page.name


# Commands


def spoken_commands() -> Iterator[tuple[str, list[str]]]:
    """Yield what is typed, with its place: commands of blocks, and those that stand within a sentence."""
    for block in SHELL:
        for command in block.commands():
            for part in re.split(r"\s*(?:&&|\|\|?|;|&$)\s*", command):
                yield str(block), words_of(part)
    for page in PAGES:
        for code in re.findall(r"`([^`\n]+)`", prose_of(page)):
            if re.match(r"(?:\w+=\S+ )*(?:celery -A \S+ |cluster-tasks )", code):
                yield page.name, words_of(code)


def words_of(command: str) -> list[str]:
    try:
        words = shlex.split(command, comments=True)
    except ValueError:  # A quote within which there was something to split at.
        words = command.split()
    while words and re.match(r"\w+=", words[0]):
        words.pop(0)
    return words


OURS = [(where, words) for where, words in spoken_commands() if words and words[0] in ("celery", "cluster-tasks")]


def resolve(group: click.Command, words: list[str]) -> tuple[click.Command, list[str]]:
    """Follow the names of subcommands; return the command that is meant, and the words that it is given."""
    while isinstance(group, click.Group) and words and re.match(r"[a-z]", words[0]):
        name, *words = words
        alternatives = name.split("|")
        for alternative in alternatives:
            assert alternative in group.commands, f"there is no {group.name} {alternative}"
        group = group.commands[alternatives[0]]
    return group, words


@pytest.mark.parametrize(("where", "words"), OURS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_command_of_ours_exists_with_its_options(where: str, words: list[str]) -> None:
    program, *rest = words
    if program == "cluster-tasks":
        if not rest:
            return
        name, *rest = rest
        assert name in main.commands, f"{where}: there is no cluster-tasks {name}"
        command = BEHIND.get(name, main.commands[name])
    else:
        assert rest[0] == "-A", f"{where}: {words}"
        command, rest = resolve(celery_command, [word for word in rest[2:] if word != "…"])
    if command.name == "flower":  # Its options are Tornado's.
        return
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    for option in (word.partition("=")[0].strip("[]") for word in rest if re.match(r"\[?-", word)):
        assert option in known, f"{where}: {' '.join(words)}: there is no {option}"


@pytest.mark.parametrize("page", PAGES, ids=page_ids)
def test_commands_that_are_named_by_their_group_exist(page: Path) -> None:
    for words in re.findall(r"`cluster ([a-z][a-z|-]*(?: [a-z][a-z|]*)*)", prose_of(page)):
        resolve(cluster_command, words.split())


def test_what_is_made_and_installed_exists() -> None:
    for where, words in spoken_commands():
        if words[:1] == ["make"]:
            assert {word for word in words[1:] if "=" not in word} <= TARGETS, where
    extras = PROJECT["optional-dependencies"].keys()
    for page in PAGES:
        for named in re.findall(r"(?:cluster-tasks|\.)\[([\w,-]+)\]", page.read_text(encoding="utf-8")):
            assert set(named.split(",")) <= extras, page.name


# Settings


@pytest.mark.parametrize("page", PAGES, ids=page_ids)
def test_every_setting_that_is_named_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = {name.lower() for name in re.findall(rf"\b{ENV_PREFIX}([A-Z_]+[A-Z])\b", text)}
    # Only what is set like one: a module, a label or a metric may begin with the same word.
    named |= set(re.findall(rf"\b{CONF_PREFIX}(\w+) = ", text))
    assert named - NOT_SETTINGS <= ClusterSettings.model_fields.keys()


def rows_of_settings() -> dict[str, str]:
    """Return what docs/settings.md calls the default of each setting."""
    rows = re.findall(rf"^\| `{ENV_PREFIX}(\w+)` \| (.*?) \|", (ROOT / "docs/settings.md").read_text(), re.MULTILINE)
    return {name.lower(): default for name, default in rows}


def test_every_setting_is_documented_with_its_default() -> None:
    assert rows_of_settings().keys() == ClusterSettings.model_fields.keys()
    for name, told in rows_of_settings().items():
        default = ClusterSettings.model_fields[name].get_default(call_default_factory=True)
        if default is None or (not default and not isinstance(default, (bool, int, float))):
            assert "`" not in told, f"{name} has no default"
        elif isinstance(default, bool):
            assert told == str(default).lower(), name
        elif isinstance(default, (int, float)):
            assert float(told) == default, name
        else:
            value = default.get_secret_value() if isinstance(default, SecretStr) else default
            words = sorted(value) if isinstance(value, frozenset) else [str(value)]
            assert told == f"`{','.join(words)}`", name


# Links


def anchors_of(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", prose_of(page), re.MULTILINE)
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


def test_every_link_of_the_readme_leads_somewhere() -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        if not link.startswith("http"):
            assert (ROOT / path).exists(), link
            assert not anchor or anchor in anchors_of(ROOT / path), link


@pytest.mark.parametrize(
    ("text", "also", "is_built"),
    [
        ("[there](other.md#a-heading)", "other.md", True),
        ("[there](nowhere.md)", "other.md", False),
        ("[there](other.md#no-heading)", "other.md", False),
        ("[there](other.md)", "in-no-menu.md", False),
    ],
)
def test_what_leads_nowhere_ends_the_build_of_the_site(tmp_path: Path, text: str, also: str, is_built: bool) -> None:
    pages = {"index.md": text, "other.md": "# A heading\n"}
    for name, content in (pages | {also: "# A heading\n"}).items():
        (tmp_path / "docs" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "docs" / name).write_text(content)
    config = load_config(
        str(ROOT / "mkdocs.yml"), docs_dir=str(tmp_path / "docs"), site_dir=str(tmp_path / "site"), strict=True,
        nav=list(pages), plugins=["search"],
    )  # fmt: skip
    with nullcontext() if is_built else pytest.raises(Abort):
        build(config)


def test_every_page_is_in_the_menu() -> None:
    # Not parsed: mkdocs has tags of its own in YAML.
    named = set(re.findall(r":? ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert named == {page.name for page in PAGES if page.parent.name == "docs"}
