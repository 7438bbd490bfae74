"""What can be set, how it is refused, and that no secret is ever shown."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import traceback
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cluster_tasks.addresses.secret import SecretUrl
from cluster_tasks.errors import ClusterError, ConfigurationError
from cluster_tasks.model import NodeRole
from cluster_tasks.redis_store import database_of, is_same_server
from cluster_tasks.settings import LONGEST_TTL_S, ClusterSettings, load_settings

SECRET = "s3cret"
URL_SETTINGS = [name for name, field in ClusterSettings.model_fields.items() if "SecretUrl" in str(field.annotation)]


def load(conf: dict[str, Any] | None = None) -> ClusterSettings:
    return load_settings(conf or {}, os.environ)


def refusal(conf: dict[str, Any] | None = None) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load(conf)
    return str(caught.value)


def test_nothing_needs_to_be_set() -> None:
    settings = load()
    assert settings.broker_url.get_secret_value() == "redis://127.0.0.1:6379/0"
    assert settings.name == "cluster"
    assert (settings.heartbeat_s, settings.lease_s, settings.health_check_s) == (1.0, 3.0, 0.5)
    assert settings.roles == {NodeRole.WORKER}
    assert settings.serves is None


def test_keys_of_celery_itself_are_left_alone() -> None:
    assert load({"broker_url": "amqp://elsewhere", "task_acks_late": True}) == load()


def test_a_key_of_the_configuration_is_taken() -> None:
    assert load({"cluster_lease_s": 9}).lease_s == 9.0


def test_a_variable_wins_over_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLUSTER_LEASE_S", "7")
    assert load({"cluster_lease_s": 9}).lease_s == 7.0


def test_an_empty_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLUSTER_LEASE_S", "")
    assert load({"cluster_lease_s": 9}).lease_s == 9.0


def test_variables_hold_lists_and_pairs_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLUSTER_SERVES", "llm, ocr,")
    monkeypatch.setenv("CLUSTER_ROLES", "cache,worker")
    monkeypatch.setenv("CLUSTER_METADATA", "zone=a, weight=3, note=x=y")
    settings = load()
    assert settings.serves == frozenset({"llm", "ocr"})
    assert settings.roles == {NodeRole.CACHE, NodeRole.WORKER}
    assert settings.metadata == {"zone": "a", "weight": "3", "note": "x=y"}


def test_the_configuration_holds_lists_and_pairs_as_python_values() -> None:
    settings = load({"cluster_serves": ["llm"], "cluster_metadata": {"zone": "a"}})
    assert settings.serves == frozenset({"llm"})
    assert settings.metadata == {"zone": "a"}


def test_the_zone_of_a_process_is_in_what_its_node_says_of_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load({"cluster_metadata": {"rack": "1"}}).node_metadata == {"rack": "1"}
    monkeypatch.setenv("CLUSTER_ZONE", "eu-west.1")
    assert load({"cluster_metadata": {"rack": "1"}}).node_metadata == {"rack": "1", "zone": "eu-west.1"}
    assert load({"cluster_metadata": {"zone": "eu-west.1"}}).node_metadata == {"zone": "eu-west.1"}


def test_two_zones_of_one_process_are_refused_with_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLUSTER_ZONE", "west")
    said = "CLUSTER_ZONE='west', but the metadata of this node say 'east': leave one of them out"
    with pytest.raises(ConfigurationError, match=re.escape(said)):
        load_settings({"cluster_metadata": {"zone": "east"}}, os.environ)


JOINED = {"west": "consul://t@127.0.0.1:8500/west?tags=a,b", "east": "etcd://a:2379,b:2379/x", "n": "redis://:p@h/1"}


def test_registries_are_joined_by_pairs_in_a_variable_and_a_mapping_in_the_configuration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from_conf = load({"cluster_registry_join": JOINED}).registry_join
    assert {name: url.get_secret_value() for name, url in from_conf.items()} == JOINED
    # A URL may hold commas itself.
    monkeypatch.setenv("CLUSTER_REGISTRY_JOIN", ", ".join(f"{name}={url}" for name, url in JOINED.items()))
    assert load().registry_join == from_conf
    assert ":p@" not in repr(load())


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("redis://host/0", "expected NAME=URL pairs separated by commas, as west=consul://"),
        ("west=", "expected NAME=URL pairs"),
        ("two words=redis://h/0", "the name 'two words' is no word of letters"),
        ("west=memory://", "west: expected redis://, rediss://"),
        ("west=zookeeper://h", "west: expected redis://, rediss://"),
        ("west=consul://:8500", "west: consul:// URL: it has no host"),
        ("a=redis://h/1,a=redis://h/2", "the name 'a' is given twice"),
    ],
)
def test_what_cannot_be_joined_is_refused(monkeypatch: pytest.MonkeyPatch, value: str, said: str) -> None:
    monkeypatch.setenv("CLUSTER_REGISTRY_JOIN", value)
    with pytest.raises(ConfigurationError, match=re.escape(f"CLUSTER_REGISTRY_JOIN={value!r}: {said}")):
        load_settings({}, os.environ)


def test_a_cluster_is_not_joined_to_itself() -> None:
    said = "cluster_registry_join={'west': 'redis://:**@h/1'}: that is the registry of this cluster itself"
    with pytest.raises(ConfigurationError, match=re.escape(said)):
        load({"cluster_registry_url": "redis://:p@h/1", "cluster_registry_join": {"west": "redis://:p@h/1"}})


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load().name = "other"


def test_a_request_types_own_strategy_comes_before_the_common_one() -> None:
    settings = load(
        {"cluster_strategy": "adaptive", "cluster_strategies": {"ocr": "weighted", "embedding": "adaptive"}}
    )
    assert settings.strategy_for("ocr") == "weighted"
    assert settings.strategy_for("retrieval") == "adaptive"
    assert settings.strategy_for("anything") == "adaptive"
    assert settings.strategy_for("llm") == "consistent_hash"


def test_a_request_type_in_strategies_comes_before_its_named_setting() -> None:
    assert load({"cluster_strategies": {"llm": "round_robin"}}).strategy_for("llm") == "round_robin"


def test_fallbacks_are_written_as_json_in_a_variable_and_as_mappings_in_the_configuration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = {"cluster_llm_base_url": "http://a/v1"}
    written = [{"base_url": "http://b/v1", "model": "m", "tokens_per_minute": 9}, {"model": "small"}]
    from_conf = load({**first, "cluster_llm_fallbacks": written}).llm_fallbacks
    assert [fallback.model_dump(exclude_defaults=True) for fallback in from_conf] == [
        {"base_url": SecretUrl("http://b/v1"), "model": "m", "tokens_per_minute": 9}, {"model": "small"},
    ]  # fmt: skip
    monkeypatch.setenv("CLUSTER_LLM_FALLBACKS", json.dumps(written))
    assert load(first).llm_fallbacks == from_conf


# What is wrong is refused with the key, the value and what was meant.


def test_a_refusal_is_an_error_of_this_package_and_a_value_error() -> None:
    with pytest.raises(ClusterError):
        load({"cluster_port": -1})
    with pytest.raises(ValueError, match="cluster_port"):
        load({"cluster_port": -1})


@pytest.mark.parametrize("name", ["ttl_s", "search_ttl_s", "kept_s", "staleness_s", "timeout_s"])
@pytest.mark.parametrize("value", ["inf", "nan", "-1", str(LONGEST_TTL_S + 1)])
def test_times_of_the_cache_that_cannot_be_are_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    variable = f"CLUSTER_CACHE_{name.upper()}"
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigurationError, match=re.escape(f"{variable}={value!r}: ")):
        load_settings({}, os.environ)


@pytest.mark.parametrize(
    ("conf", "named"),
    [
        ({"cluster_lease_s": "soon"}, "cluster_lease_s='soon'"),
        ({"cluster_heartbeat_s": 0}, "cluster_heartbeat_s=0"),
        ({"cluster_port": 65536}, "cluster_port=65536"),
        ({"cluster_virtual_nodes": 0}, "cluster_virtual_nodes=0"),
        ({"cluster_failure_threshold": 0}, "cluster_failure_threshold=0"),
        ({"cluster_provider_max_retries": 21}, "cluster_provider_max_retries=21"),
        ({"cluster_name": "Two Words"}, "cluster_name='Two Words'"),
        ({"cluster_name": "suspect"}, "cluster_name='suspect': its queues, suspect.node.…, would be lists of"),
        ({"cluster_serves": ["LLM!"]}, "'LLM!'"),
        ({"cluster_roles": ["boss"]}, "cluster_roles=['boss']: Input should be 'master', 'worker' or 'cache'"),
        ({"cluster_zone": "two words"}, "cluster_zone='two words'"),
        ({"cluster_zone_bound": 0.9}, "cluster_zone_bound=0.9"),
        ({"cluster_zone_bound": "nan"}, "cluster_zone_bound='nan'"),
        ({"cluster_metadata": "zone"}, "cluster_metadata='zone': expected key=value pairs"),
        ({"cluster_registry_url": "zookeeper://host"}, "cluster_registry_url='zookeeper://host'"),
        ({"cluster_broker_url": "amqp://host"}, "cluster_broker_url='amqp://host'"),
        ({"cluster_broker_url": "localhost"}, "cluster_broker_url='localhost'"),
        ({"cluster_result_backend": "db+sqlite:///x"}, "cluster_result_backend='db+sqlite:///x'"),
        ({"cluster_breaker_timeout_s": 0}, "cluster_breaker_timeout_s=0"),
        ({"cluster_llm_fallbacks": "backup"}, 'expected JSON such as [{"base_url"'),
        ({"cluster_llm_fallbacks": [{"url": "http://b/v1", "model": "m"}]}, "0.url: Extra inputs are not permitted"),
        ({"cluster_llm_fallbacks": [{"base_url": "b:8000"}]}, "base_url: expected http(s)://host/path"),
        ({"cluster_llm_fallbacks": [{}]}, "expected a base_url or a model"),
        ({"cluster_llm_fallbacks": [{"model": "m"}]}, "llm_base_url is not"),
        (
            {
                "cluster_embedding_base_url": "http://a/v1",
                "cluster_embedding_model": "m",
                "cluster_embedding_fallbacks": [{"base_url": "http://b/v1", "model": "n"}],
            },
            "vectors of two models cannot be compared",
        ),
    ],
)
def test_a_value_that_cannot_work_is_named_with_its_key(conf: dict[str, Any], named: str) -> None:
    assert named in refusal(conf)


def test_all_wrong_values_are_told_at_once() -> None:
    message = refusal({"cluster_port": -1, "cluster_name": "Bad"})
    assert "cluster_port=-1" in message
    assert "cluster_name='Bad'" in message


def test_a_wrong_value_of_a_variable_is_named_by_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLUSTER_LEASE_S", "soon")
    assert "CLUSTER_LEASE_S='soon'" in refusal()


def test_a_wrong_value_under_an_empty_variable_is_named_by_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLUSTER_LEASE_S", "")
    assert "cluster_lease_s='soon'" in refusal({"cluster_lease_s": "soon"})


def test_a_redis_cluster_as_broker_is_refused_with_the_reason() -> None:
    assert "Kombu has no transport" in refusal({"cluster_broker_url": "redis-cluster://host:7000"})


@pytest.mark.parametrize(
    "url",
    [
        "redis://host/0",
        "rediss://host/0?ssl_cert_reqs=none",
        "redis+socket:///run/redis.sock?virtual_host=1",
        "sentinel://a:26379;sentinel://b:26379/0",
    ],
)
def test_each_way_to_reach_a_redis_is_taken(url: str) -> None:
    settings = load({"cluster_broker_url": url, "cluster_result_backend": url, "cluster_registry_url": url})
    assert settings.broker_url.get_secret_value() == url


def test_a_worker_that_is_held_up_for_less_than_a_lease_is_not_stuck() -> None:
    assert (load({}).stuck_after_s, load({"cluster_lease_s": 9}).stuck_after_s) == (30.0, 90.0)
    assert load({"cluster_stuck_s": 4}).stuck_after_s == 4.0
    assert "stuck_s=2.0" in refusal({"cluster_stuck_s": 2})


def test_a_lease_must_outlast_a_late_beat() -> None:
    assert load({"cluster_heartbeat_s": 1.5, "cluster_lease_s": 3}).lease_s == 3.0
    message = refusal({"cluster_heartbeat_s": 1.6, "cluster_lease_s": 3})
    assert "lease_s=3.0" in message
    assert "heartbeat_s=1.6" in message


def test_an_unknown_key_is_refused_with_the_nearest_name() -> None:
    message = refusal({"cluster_leese_s": 3})
    assert "cluster_leese_s=3" in message
    assert "did you mean 'cluster_lease_s'?" in message


def test_an_unknown_key_that_is_like_no_other_gets_no_advice() -> None:
    message = refusal({"cluster_qqqqqq": 3})
    assert message == "unknown setting cluster_qqqqqq=3"


def test_a_misspelt_variable_is_refused_with_the_nearest_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLUSTER_BROKER_ULR", "redis://host")
    message = refusal()
    assert "CLUSTER_BROKER_ULR" in message
    assert "did you mean 'CLUSTER_BROKER_URL'?" in message


@pytest.mark.parametrize(
    "variable",
    ["CLUSTER_SERVICE_HOST", "CLUSTER_SERVICE_PORT", "CLUSTER_PORT_6379_TCP_ADDR", "CLUSTER_ID", "CLUSTER_NODES"],
)
def test_a_variable_that_a_platform_sets_is_tolerated(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "10.0.0.1")
    assert load() == ClusterSettings()


# Secrets.


def with_secrets() -> ClusterSettings:
    conf: dict[str, Any] = {f"cluster_{name}": f"redis://user:{SECRET}@host:6379/0" for name in URL_SETTINGS}
    conf |= {"cluster_llm_api_key": SECRET, "cluster_embedding_api_key": SECRET}
    conf["cluster_vector_url"] = f"qdrants://:{SECRET}@host"
    conf["cluster_registry_join"] = {"east": f"consul://{SECRET}@host"}
    return load({**conf, "cluster_llm_fallbacks": [{"base_url": f"http://a:{SECRET}@b/v1", "api_key": SECRET}]})


def test_every_url_and_key_is_kept_as_a_secret() -> None:
    for name, field in ClusterSettings.model_fields.items():
        if name.endswith(("_url", "_key", "_backend")):
            assert "Secret" in str(field.annotation), name


def test_no_way_to_print_settings_shows_a_secret() -> None:
    settings = with_secrets()
    shown = [repr(settings), str(settings), f"{settings}", repr(settings.model_dump()), settings.model_dump_json()]
    shown += [f"{value} {value!r}" for _, value in settings if isinstance(value, SecretUrl)]
    assert SECRET not in "\n".join(shown)


def test_a_secret_can_be_had_by_who_asks_for_it() -> None:
    settings = with_secrets()
    assert SECRET in settings.broker_url.get_secret_value()
    assert settings.llm_api_key is not None
    assert settings.llm_api_key.get_secret_value() == SECRET


def test_settings_keep_their_secrets_when_copied_to_another_process() -> None:
    settings = with_secrets()
    assert pickle.loads(pickle.dumps(settings)) == settings
    assert copy.deepcopy(settings) == settings


def test_a_url_shows_all_but_its_password() -> None:
    assert str(SecretUrl(f"redis://user:{SECRET}@host:6379/2")) == "redis://user:**@host:6379/2"
    assert str(SecretUrl("redis://host:6379/2")) == "redis://host:6379/2"


@pytest.mark.parametrize(
    "url",
    [
        f"redis://:{SECRET}@host/0",
        f"redis://user:{SECRET}@host:not-a-port/0",
        f"redis://user:un;quoted/{SECRET}@x@host/0",
        f"redis://host/0?password={SECRET}",
        f"consul://un@quoted{SECRET}@host",
        f"sentinel://:{SECRET}@a:26379;sentinel://:{SECRET}@b:26379/0",
        f"https://user:{SECRET}@[::1]:8000/v1",
    ],
)
def test_a_url_of_any_form_can_be_shown_and_hides_its_password(url: str) -> None:
    shown = f"{SecretUrl(url)} {SecretUrl(url)!r}"
    assert SECRET not in shown
    assert "**" in shown


def test_a_webhook_shows_its_host_only() -> None:
    url = load({"cluster_alert_url": f"https://{SECRET}:{SECRET}@hooks.example.org/{SECRET}?key={SECRET}"}).alert_url
    assert (str(url), repr(url)) == ("https://hooks.example.org/**", "SecretWebhookUrl('https://hooks.example.org/**')")


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=4))
def test_no_password_shows_through(password: str) -> None:
    assert str(SecretUrl(f"redis://user:{password}@host:1/0")) == "redis://user:**@host:1/0"


@pytest.mark.parametrize(
    "conf",
    [
        {"cluster_broker_url": f"amqp://user:{SECRET}@host"},
        {"cluster_broker_url": f"redis-cluster://:{SECRET}@host"},
        {"cluster_registry_url": f"zookeeper://:{SECRET}@host"},
        {"cluster_broker_url": [f"redis://:{SECRET}@host"]},
        {"cluster_llm_api_key": [SECRET]},
        {"cluster_alert_url": f"ftp://host/{SECRET}"},
        {"cluster_alert_url": f"https:///{SECRET}"},
        {"cluster_alert_url": f"https://host/{SECRET} two"},
        {"cluster_alert_url": f"https://host:port/{SECRET}"},
        {"cluster_alert_secret": [SECRET]},
        {"cluster_alert_secrt": SECRET},
        {"cluster_alerts_url": f"https://host/{SECRET}"},
        {"cluster_flower_password": f"{SECRET},x"},
        {"cluster_flower_password": ""},
        {"cluster_flower_pasword": SECRET},
        {"cluster_llm_api_kee": SECRET},
        {"cluster_llm_key": SECRET},
        {"cluster_broker_ulr": f"redis://:{SECRET}@host"},
        {"cluster_brokers": {"first": f"redis://:{SECRET}@host"}},
        {"cluster_llm_fallbacks": f'[{{"api_key": "{SECRET}"'},
        {"cluster_llm_fallbacks": [{"api_key": SECRET, "modle": "m"}]},
        {"cluster_llm_fallbacks": [{"api_key": SECRET, "model": "m"}]},
        {"cluster_llm_falbacks": [{"api_key": SECRET}]},
        {"cluster_registry_join": f"consul://{SECRET}@host"},
        {"cluster_registry_join": {"east": f"amqp://:{SECRET}@host"}},
        {"cluster_registry_join": {"two words": f"consul://{SECRET}@host"}},
        {"cluster_registry_join": {"east": f"consul://{SECRET}@host/no datacentre"}},
    ],
)
def test_no_error_shows_a_secret_nor_its_traceback(conf: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load(conf)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    "url", ["redis//:{}@host", "redis:/:{}@host", "redis:{}@host", ":{}**@host/0", "amqp://us/er:{}@host", "a//{}@b@c"]
)
def test_a_url_that_is_mistyped_shows_no_secret(url: str) -> None:
    url = url.format(SECRET)
    assert SECRET not in f"{SecretUrl(url)} {SecretUrl(url)!r}"
    # Those of providers are looked at where they are used.
    for name in (*(name for name in URL_SETTINGS if not name.endswith("_base_url")), "broker_ulr", "brokers", "cache"):
        assert SECRET not in refusal({f"cluster_{name}": url}), name


def test_an_address_in_a_setting_that_is_no_url_is_shown() -> None:
    assert "cluster_zone='me@here'" in refusal({"cluster_zone": "me@here"})


def test_no_error_about_a_variable_shows_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLUSTER_BROKER_URL", f"amqp://user:{SECRET}@host")
    assert SECRET not in refusal()
    monkeypatch.setenv("CLUSTER_LLM_API_KEE", SECRET)
    assert SECRET not in refusal()


def test_json_of_the_settings_can_be_read() -> None:
    assert json.loads(with_secrets().model_dump_json())["name"] == "cluster"


@pytest.mark.parametrize(
    ("url", "other", "same"),
    [
        ("redis://host/0", "redis://host/1", True),
        ("redis://host", "redis://host/1", True),
        ("redis://:secret@host:6380/0?x=1", "redis://:secret@host:6380/3?x=1", True),
        ("sentinel://a:1/0;sentinel://b:1/0", "sentinel://a:1/2;sentinel://b:1/2", True),
        ("redis+socket:///run/redis.sock", "redis+socket:///run/redis.sock?virtual_host=2", True),
        ("redis://host/0", "redis://other/0", False),
        ("redis://host:6380/0", "redis://host:6379/0", False),
        ("redis://host/0", "rediss://host/0", False),
        ("redis://host/0", "db+sqlite:///results", False),
    ],
)
def test_two_urls_are_of_one_redis_whatever_databases_they_name(url: str, other: str, same: bool) -> None:
    assert is_same_server(url, other) is same


@pytest.mark.parametrize(
    ("url", "database"),
    [("redis://host", 0), ("redis://host/", 0), ("redis://host/3", 3), ("sentinel://a:1/2;sentinel://b:1/2", 2)]
    + [("redis+socket:///run/redis.sock", 0), ("redis+socket:///run/redis.sock?virtual_host=4", 4)],
)
def test_a_url_names_its_database(url: str, database: int) -> None:
    assert database_of(url) == database
