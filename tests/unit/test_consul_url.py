"""What a consul:// URL may say, and what is said of one that cannot be used."""

from __future__ import annotations

import subprocess
import sys

import pytest

from cluster_tasks.addresses.consul import ConsulUrl, parse_consul_url
from cluster_tasks.addresses.secret import SecretUrl
from cluster_tasks.errors import ConfigurationError
from cluster_tasks.settings import load_settings

SECRET = "7f1c-very-secret"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("consul://localhost", ConsulUrl(host="localhost")),
        ("consul://[::1]:8600/", ConsulUrl(host="::1", port=8600)),
        ("consul://h?scheme=https", ConsulUrl(host="h", port=8501, scheme="https")),
        (f"consul://{SECRET}@h:1/dc_2", ConsulUrl(host="h", port=1, token=SECRET, datacenter="dc_2")),
        (f"consul://:{SECRET}@h", ConsulUrl(host="h", token=SECRET)),
        ("consul://a%2Fb%40@h", ConsulUrl(host="h", token="a/b@")),
        (
            "consul://h?service=gpu-nodes&tags=a,b:c,&ttl=1.5m",
            ConsulUrl(host="h", service="gpu-nodes", tags=("a", "b:c"), ttl_s=90.0),
        ),
        ("consul://h?ttl=500ms&tags=", ConsulUrl(host="h", ttl_s=0.5)),
        (
            "consul://h?scheme=https&verify=false&ca=/ca.pem&cert=/c.pem&key=/k.pem",
            ConsulUrl(host="h", port=8501, scheme="https", verify=False, ca="/ca.pem", cert="/c.pem", key="/k.pem"),
        ),
    ],
)
def test_each_part_of_a_url_is_read(url: str, expected: ConsulUrl) -> None:
    assert parse_consul_url(url) == expected


@pytest.mark.parametrize(
    ("url", "named"),
    [
        ("consul://", "it has no host"),
        ("consul:///dc1", "it has no host"),
        ("consul://h:port", "its host and port cannot be read"),
        ("consul://h:0", "expected consul://[token@]host:8500/[datacenter]"),
        ("consul://h/#x", "expected consul://[token@]host:8500/[datacenter]"),
        ("consul://h/a/b", "datacenter='a/b': expected letters, digits, - and _"),
        ("consul://h?servise=x", "unknown option 'servise'; did you mean 'service'?"),
        ("consul://h?service=", "service='': expected a value"),
        ("consul://h?service=a.b", "service='a.b': expected a DNS label"),
        ("consul://h?service=-a", "service='-a': expected a DNS label"),
        (f"consul://h?service={'a' * 64}", "expected a DNS label"),
        ("consul://h?service=consul", "service='consul': Consul's own servers have this name"),
        ("consul://h?tags=a b", "tags='a b': expected letters, digits"),
        ("consul://h?ttl=15", "ttl='15': expected a number above 0 with its unit"),
        ("consul://h?ttl=0s", "ttl='0s': expected a number above 0 with its unit"),
        ("consul://h?ttl=1d", "ttl='1d': expected a number above 0 with its unit"),
        ("consul://h?ttl=15s&ttl=16s", "an option is given twice"),
        ("consul://h?scheme=htps", "scheme='htps': expected http or https; did you mean 'https'?"),
        ("consul://h?ca=/ca.pem", "ca='/ca.pem': it is for TLS; add scheme=https"),
        ("consul://h?scheme=https&verify=no", "verify='no': expected true or false"),
        ("consul://h?scheme=https&cert=/c.pem", "cert and key come together"),
        (f"consul://h?token={SECRET}", "the token is written before the host"),
        (f"consul://{SECRET}%20x@h", "the token has blanks"),
        (f"consul://x/{SECRET}@h", "its host and port cannot be read"),
        (f"consul://x?{SECRET}@h", "its host and port cannot be read"),
        (f"consul://{SECRET}@h:port", "its host and port cannot be read"),
    ],
)
def test_what_cannot_be_used_is_named_and_no_token_is_shown(url: str, named: str) -> None:
    for refuse in (parse_consul_url, lambda url: load_settings({"cluster_registry_url": url}, {})):
        with pytest.raises(ConfigurationError) as error:
            refuse(url)
        assert named in str(error.value)
        assert SECRET not in str(error.value)


def test_a_token_is_not_shown() -> None:
    assert SECRET not in repr(parse_consul_url(f"consul://{SECRET}@h"))
    for url in (f"consul://{SECRET}@h:1/dc", f"consul://:{SECRET}@h:1/dc", f"consul://u:{SECRET}@h:1/dc"):
        assert str(SecretUrl(url)) in ("consul://**@h:1/dc", "consul://:**@h:1/dc", "consul://u:**@h:1/dc")
    settings = load_settings({"cluster_registry_url": f"consul://{SECRET}@h"}, {})
    assert SECRET not in repr(settings)


def test_a_check_must_outlast_a_late_beat() -> None:
    load_settings({"cluster_registry_url": "consul://h?ttl=2s"}, {})
    with pytest.raises(ConfigurationError, match="its ttl must be at least twice cluster_heartbeat_s=1") as error:
        load_settings({"cluster_registry_url": f"consul://{SECRET}@h?ttl=1900ms"}, {})
    assert "cluster_registry_url='consul://**@h?ttl=1900ms'" in str(error.value)


def test_a_client_that_is_not_installed_is_named_with_its_remedy() -> None:
    code = """if True:
        import sys
        sys.modules["consul"] = None
        from cluster_tasks.clock import SystemClock
        from cluster_tasks.keys import Keys
        from cluster_tasks.registry import create_registry
        create_registry("consul://h", broker_url="redis://h", keys=Keys(), clock=SystemClock())
    """
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ConfigurationError: a consul:// URL needs the client of Consul: pip install" in ended.stderr
    assert "cluster-tasks[consul]" in ended.stderr
