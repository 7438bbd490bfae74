"""What a ``qdrant://`` URL says, and how a wrong one is refused."""

from __future__ import annotations

from typing import Any

import pytest

from cluster_tasks.addresses.qdrant import parse_qdrant_url
from cluster_tasks.errors import ConfigurationError
from cluster_tasks.settings import load_settings


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("qdrant://vectors", {"host": "vectors", "port": 6333, "tls": False, "prefix": "cluster-tasks", "folder": ""}),
        ("qdrant://10.0.0.1:7000/team_a/", {"host": "10.0.0.1", "port": 7000, "prefix": "team_a"}),
        ("qdrants://:s%2Fword@db.example?ca=/etc/ca.pem", {"tls": True, "ca": "/etc/ca.pem", "host": "db.example"}),
        ("qdrant://[::1]:6334", {"host": "[::1]", "port": 6334}),
        ("qdrant:///var/lib/my%20data/", {"folder": "/var/lib/my data", "host": ""}),
    ],
)
def test_a_url_says_where_it_is_and_what_is_ours(url: str, said: dict[str, Any]) -> None:
    address = parse_qdrant_url(url)
    assert {name: getattr(address, name) for name in said} == said


@pytest.mark.parametrize("url", ["qdrant://:s%2Fword@h", "qdrants://s%2Fword@h:1"])
def test_the_key_stands_before_the_host_and_never_shows(url: str) -> None:
    address = parse_qdrant_url(url)
    assert address.key.get_secret_value() == "s/word"
    assert "word" not in f"{address!r} {address}"


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("http://host", "begins with qdrant://"),
        ("qdrant:host", "begins with qdrant://"),
        ("qdrant://", "folder"),
        ("qdrant:///", "folder"),
        ("qdrants:///data", "folder"),
        ("qdrant:///data?ca=x", "TLS"),
        ("qdrant://host:0", "port"),
        ("qdrant://host:70000", "port"),
        ("qdrant://host:x", "port"),
        ("qdrant://ho st", "names no host"),
        ("qdrant://host/a/b", "prefix"),
        ("qdrant://host/.hidden", "prefix"),
        ("qdrant://:sec/ret@host", "percent-encoding"),
        ("qdrant://:secret?@host", "percent-encoding"),
        ("qdrant://:sec ret@host", "printable"),
        ("qdrant://me:secret@host", "no user"),
        ("qdrant://host?api_key=secret", "before the host"),
        ("qdrants://host?cas=x", "did you mean 'ca'"),
        ("qdrants://host?ca=", "empty"),
        ("qdrant://host?ca=x", "qdrants://"),
    ],
)
def test_a_wrong_url_is_refused_early_and_without_its_key(url: str, problem: str) -> None:
    with pytest.raises(ConfigurationError, match=problem) as refused:
        parse_qdrant_url(url)
    assert "secret" not in str(refused.value)
    with pytest.raises(ConfigurationError, match="cluster_vector_url") as refused:
        load_settings({"cluster_vector_url": url}, {})
    assert "secret" not in str(refused.value)


def test_a_url_in_the_settings_is_masked() -> None:
    settings = load_settings({"cluster_vector_url": "qdrants://:hidden-word@host"}, {})
    assert str(settings.vector_url) == "qdrants://:**@host"
    assert "hidden-word" not in repr(settings)
