"""What an etcd:// URL may say."""

from __future__ import annotations

import re

import pytest

from cluster_tasks.addresses.etcd import parse_etcd_url
from cluster_tasks.addresses.secret import SecretUrl
from cluster_tasks.errors import ConfigurationError
from cluster_tasks.settings import load_settings


def test_a_host_is_enough() -> None:
    address = parse_etcd_url("etcd://host")
    assert (address.servers, address.prefix, address.ttl_s, address.scheme) == (
        (("host", 2379),), "/cluster-tasks", 15, "http",
    )  # fmt: skip
    assert (address.user, address.password.get_secret_value(), address.ca, address.cert) == ("", "", None, None)


def test_every_part_is_read() -> None:
    url = SecretUrl(
        "etcd://me%40x:p%2Fw%3A%40@a:1,[::1]:2;c/apps/ours/?ttl=2m&scheme=https&ca=/ca.pem&cert=/c.pem&key=/k.pem"
    )
    address = parse_etcd_url(url)
    assert address.servers == (("a", 1), ("::1", 2), ("c", 2379))
    assert (address.user, address.password.get_secret_value()) == ("me@x", "p/w:@")
    assert (address.prefix, address.ttl_s, address.scheme) == ("/apps/ours", 120, "https")
    assert (address.ca, address.cert, address.key) == ("/ca.pem", "/c.pem", "/k.pem")
    assert "p/w" not in repr(address)


@pytest.mark.parametrize(("text", "seconds"), [("2", 2), ("15s", 15), ("60m", 3600), ("3600s", 3600)])
def test_a_time_is_seconds_or_minutes(text: str, seconds: int) -> None:
    assert parse_etcd_url(f"etcd://h/p?ttl={text}").ttl_s == seconds


@pytest.mark.parametrize(
    ("rest", "reason"),
    [
        ("", "'' names no host"),
        ("/prefix", "'' names no host"),
        ("a,,b/p", "'' names no host"),
        ("a b/p", "'a b' names no host"),
        ("[::1/p", "the port of '[::1'"),
        ("a:x/p", "the port of 'a:x' is a number"),
        ("a:0/p", "the port of 'a:0' is a number"),
        ("a:65536/p", "the port of 'a:65536' is a number"),
        ("user@a/p", "a user comes with a password"),
        (":hidden@a/p", "a user comes with a password"),
        ("user:hid/den@a/p", "percent-encoding"),
        ("user:hid#den@a/p", "percent-encoding"),
        ("a/p q", "the prefix 'p q' does not match"),
        ("a/p//q", "the prefix 'p//q' does not match"),
        ("a/p?tll=15s", "unknown option 'tll'; did you mean 'ttl'?"),
        ("a/p?password=hidden", "unknown option 'password'"),
        ("a/p?ttl=", "the option ttl is empty"),
        ("a/p?ttl=1s", "ttl='1s' is not a time"),
        ("a/p?ttl=61m", "ttl='61m' is not a time"),
        ("a/p?ttl=1.5s", "ttl='1.5s' is not a time"),
        ("a/p?scheme=ftp", "scheme='ftp' is neither"),
        ("a/p?ca=/ca.pem", "ca is for TLS: add scheme=https"),
        ("a/p?scheme=https&key=/k.pem", "key comes with cert"),
    ],
)
def test_a_part_that_cannot_work_is_named_with_what_it_can_be(rest: str, reason: str) -> None:
    for refuse in (parse_etcd_url, lambda url: load_settings({"cluster_registry_url": url}, {})):
        with pytest.raises(ConfigurationError, match=re.escape(reason)) as error:
            refuse(f"etcd://{rest}")
        assert "expected etcd://[USER:PASSWORD@]HOST" in str(error.value)
        assert "hid" not in str(error.value).split("expected")[0]


def test_a_lease_must_outlast_a_late_beat() -> None:
    load_settings({"cluster_registry_url": "etcd://h?ttl=3s", "cluster_heartbeat_s": 1.5}, {})
    with pytest.raises(ConfigurationError, match=r"its ttl must be at least twice cluster_heartbeat_s=1\.5") as error:
        load_settings({"cluster_registry_url": "etcd://user:hidden@h?ttl=2s", "cluster_heartbeat_s": 1.5}, {})
    assert "hidden" not in str(error.value)
