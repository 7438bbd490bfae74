"""The settings of a cluster: one frozen object, validated once, secrets masked.

Values come from ``cluster_*`` keys of the Celery configuration and from ``CLUSTER_*`` variables, which win.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from cluster_tasks.addresses.consul import SCHEME as CONSUL_SCHEME
from cluster_tasks.addresses.consul import ConsulUrl, parse_consul_url
from cluster_tasks.addresses.etcd import SCHEME as ETCD_SCHEME
from cluster_tasks.addresses.etcd import EtcdUrl, parse_etcd_url
from cluster_tasks.addresses.qdrant import parse_qdrant_url
from cluster_tasks.addresses.redis import BROKER_SCHEMES, CACHE_CLUSTER_SCHEMES, checked_redis_url, parse_cluster_url
from cluster_tasks.addresses.secret import HIDDEN, SecretUrl, SecretWebhookUrl, masked, masked_url
from cluster_tasks.errors import ConfigurationError
from cluster_tasks.model import ZONE, NodeRole, RequestType

CONF_PREFIX = "cluster_"
ENV_PREFIX = "CLUSTER_"
MISSPELT = 0.8
"""From this similarity of names on, 0 to 1, an unknown variable is taken for a misspelt setting."""
ZONE_BOUND = 1.25
"""How a zone may be loaded above the mean: docs/datacentres.md says why so much."""
LONGEST_TTL_S = 10 * 365 * 86_400.0
"""Of what is cached."""
LEASES: Mapping[str, Callable[[str], ConsulUrl | EtcdUrl]] = {
    CONSUL_SCHEME: parse_consul_url,
    ETCD_SCHEME: parse_etcd_url,
}
"""How the URLs are read of the registries that forget a node by a time of their own."""
SECRET_WORDS = ("_key", "_password", "_secret", "_fallbacks", "alert_url")
"""In the name of a setting whose value is never shown."""
URL_WORDS = ("_url", "_backend", "registry_join")
"""In the name of a setting whose value has a login before each @."""


def _split(value: object) -> object:
    """Let ``a,b`` stand for a list, as variables of an environment must."""
    if isinstance(value, str):
        return [item for item in (part.strip() for part in value.split(",")) if item]
    return value


def _pairs(value: object) -> object:
    """Let ``zone=a,rack=3`` stand for a mapping."""
    if not isinstance(value, str):
        return value
    pairs = [part.partition("=") for part in value.split(",") if part.strip()]
    if any(not separator for _, separator, _ in pairs):
        raise ValueError("expected key=value pairs separated by commas")
    return {key.strip(): item.strip() for key, _, item in pairs}


def _urls(value: object) -> object:
    """Let ``west=consul://host/west,east=etcd://a:2379,b:2379`` stand for a mapping: a URL may have commas itself."""
    if not isinstance(value, str):
        return value
    # What has no name keeps its password: an error shows it masked, as it shows the whole.
    pairs = [part.partition("=") for part in re.split(r",\s*(?=[^,=]*=[a-z+]+://)", value.strip()) if part]
    if any(not re.match(r"[a-z+]+://", url) for _, _, url in pairs):
        raise ValueError("expected NAME=URL pairs separated by commas, as west=consul://127.0.0.1:8500/west")
    names = [name.strip() for name, _, _ in pairs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"the name {twice[0]!r} is given twice")
    return {name.strip(): url.strip() for name, _, url in pairs}


def _parsed(value: object) -> object:
    """Let JSON text stand for what it says."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        raise ValueError('expected JSON such as [{"base_url": "http://host/v1", "model": "name"}]') from None


Limit = Annotated[int, Field(ge=0)]


class Fallback(BaseModel):
    """A provider that is asked when those before it are unavailable. What is None is that of the first one."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    base_url: SecretUrl | None = None
    """None: the first provider's, with its key."""
    model: str | None = None
    api_key: SecretStr | None = None
    """None: none is sent to a ``base_url`` of its own."""
    requests_per_minute: Limit = 0
    tokens_per_minute: Limit = 0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not (self.base_url or self.model):
            raise ValueError("expected a base_url or a model")
        if self.base_url and not self.base_url.get_secret_value().startswith(("http://", "https://")):
            raise ValueError("base_url: expected http(s)://host/path")
        return self


Words = Annotated[frozenset[RequestType], NoDecode, BeforeValidator(_split)]
Roles = Annotated[frozenset[NodeRole], NoDecode, BeforeValidator(_split)]
Urls = Annotated[dict[str, SecretUrl], NoDecode, BeforeValidator(_urls)]
Pairs = Annotated[dict[str, str], NoDecode, BeforeValidator(_pairs)]
Fallbacks = Annotated[tuple[Fallback, ...], NoDecode, BeforeValidator(_parsed)]
Seconds = Annotated[float, Field(gt=0)]
CacheTime = Annotated[float, Field(ge=0.001, le=LONGEST_TTL_S)]


class ClusterSettings(BaseSettings):
    """What can be set, with defaults. Durations are in seconds."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, frozen=True, extra="forbid", env_ignore_empty=True, hide_input_in_errors=True
    )

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,31}$")] = "cluster"
    """Prefix of every key, list and channel; two clusters with two names share a Redis. Tasks without ClusterTask are
    in Celery's own queues: give the two apps each a ``task_default_queue``, too."""
    broker_url: SecretUrl = SecretUrl("redis://127.0.0.1:6379/0")
    result_backend: SecretUrl | None = None
    """None: the Redis of the broker, which alone can commit a result and its delivery in one step."""
    sentinel_master: str = "mymaster"
    """Name of the Redis group behind a ``sentinel://`` URL."""
    registry_url: SecretUrl | None = None
    """None: the Redis of the broker."""

    registry_join: Urls = Field(default_factory=dict)
    """Name → registry of another cluster of the same ``name`` on another Redis: its nodes can be looked at."""

    strategy: str = "least_connection"
    strategy_llm: str = "consistent_hash"
    strategy_retrieval: str | None = None
    strategy_embedding: str | None = None
    strategies: Pairs = Field(default_factory=dict)
    """Request type → strategy, for types of your own."""
    virtual_nodes: Annotated[int, Field(ge=1, le=10_000)] = 160
    """Points of a node on the ring of ``consistent_hash``."""
    snapshot_s: Seconds = 0.25
    """How old the router's view of the nodes may be."""

    serves: Words | None = None
    """Request types this node takes; None: all that its tasks declare."""
    roles: Roles = frozenset({NodeRole.WORKER})
    metadata: Pairs = Field(default_factory=dict)
    """What a NodeFilter may ask for; ``weight`` counts for the strategy ``weighted``."""
    zone: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")] | None = None
    """The datacentre of this process: its jobs go to nodes of the same one first, and a node says so in its metadata.

    None: all nodes are alike to it.
    """
    zone_bound: Annotated[float, Field(ge=1)] = ZONE_BOUND
    """A zone that has no free slot is passed over when it has so many times the jobs for each slot that all have."""
    address: str | None = None
    """Where others reach this node; None: the name of its host."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    max_qps: Annotated[float, Field(ge=0)] = 0.0
    max_memory_mb: Annotated[int, Field(ge=0)] = 0

    max_message_bytes: Annotated[int, Field(ge=1_000)] = 16 * 1024 * 1024
    """A job whose message is larger is refused in its caller with PayloadTooLarge. Arguments grow by a third in it.

    One that is compressed counts as what it would be otherwise; a node keeps one that is larger as undecodable.
    """
    max_result_bytes: Annotated[int, Field(ge=100_000, le=500 * 1024 * 1024)] = 128 * 1024 * 1024
    """A job whose result is larger, as it is stored, fails with PayloadTooLarge. Tracebacks must find room.

    It must be less than what Redis takes at once (``proto-max-bulk-len``, 512 MiB), and what the network carries there
    in five seconds: else the job is run again and again.
    """

    heartbeat_s: Seconds = 1.0
    lease_s: Seconds = 3.0
    """A node whose beat counter stands still for so long may be fenced."""
    health_check_s: Seconds = 0.5
    failure_threshold: Annotated[int, Field(ge=1)] = 1
    """Checks in a row that must find a node still."""
    recovery_threshold: Annotated[int, Field(ge=1)] = 2
    """Beats in a row before a node that was lost and came back gets jobs."""
    auto_rebalance: bool = True
    """Whether waiting jobs are moved to nodes with shorter lists: when a node joins, and every ``rebalance_s``."""
    rebalance_s: Seconds = 10.0
    ejection: bool = True
    """Whether nodes that do their jobs worse than the others are taken out, probed and let in again."""
    ejection_slow_factor: Annotated[float, Field(ge=0)] = 10.0
    """A node that takes so many times as long as the others is taken out; 0: none is for that."""
    max_crash_deliveries: Annotated[int, Field(ge=1)] = 3
    """A job that was running when so many processes died is put into quarantine."""
    quarantine_ttl_s: Annotated[float, Field(ge=1)] = 30 * 24 * 3600.0
    """How long a job stays in quarantine with its arguments, which may be private."""
    quarantine_max: Annotated[int, Field(ge=1)] = 1_000
    """How many jobs quarantine keeps, each as large as its message; beyond, the oldest go."""
    drain_timeout_s: Seconds = 30.0
    """How long running jobs may take to finish after SIGTERM; then they are handed back, and others run them."""
    on_fenced: Literal["kill", "abandon"] = "kill"
    """What a node does with running jobs that others have been given: end their processes (pools of threads and solo
    have none, and abandon), or let them run on in the slots that they fill; they are not committed."""
    stuck_s: Seconds | None = None
    """A node that beats, and whose event loop, consumer or pool makes no progress for so long, gives up and exits.

    None: ten leases, 30 s at least.
    """

    alert_url: SecretWebhookUrl | None = None
    """Where alerts are posted as JSON; None: they are events and lines of the log only."""
    alert_secret: SecretStr | None = None
    """Signs what is posted; None: it is not signed."""
    metrics_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Where a coordinator serves the metrics of the cluster; 0: nowhere."""
    metrics_host: str = "127.0.0.1"
    """The address that it listens on. There is no password."""
    flower_password: SecretStr | None = None
    """Of the user ``cluster`` of the Flower that ``cluster-tasks up`` starts; None: who is on this machine may look."""

    llm_base_url: SecretUrl | None = None
    """An OpenAI-compatible endpoint; None: ``local-extractive``."""
    llm_model: str | None = None
    llm_api_key: SecretStr | None = None
    llm_timeout_s: Seconds = 120.0
    llm_fallbacks: Fallbacks = ()
    """Further providers, in their order; in a variable as JSON."""
    llm_requests_per_minute: Limit = 0
    """Of the whole cluster; 0: no limit."""
    llm_tokens_per_minute: Limit = 0
    embedding_base_url: SecretUrl | None = None
    """An OpenAI-compatible endpoint; None: embeddings are computed on the node."""
    embedding_model: str | None = None
    """Without an endpoint ``local-hash``, which None stands for, or ``local-static``."""
    embedding_api_key: SecretStr | None = None
    embedding_timeout_s: Seconds = 30.0
    embedding_fallbacks: Fallbacks = ()
    """Other places of the same model: vectors of two models cannot be compared."""
    embedding_requests_per_minute: Limit = 0
    embedding_tokens_per_minute: Limit = 0
    rerank_base_url: SecretUrl | None = None
    """An endpoint that takes ``/rerank`` as Jina and Cohere do; None: ``local-mmr``."""
    rerank_model: str | None = None
    rerank_api_key: SecretStr | None = None
    rerank_timeout_s: Seconds = 30.0
    rerank_fallbacks: Fallbacks = ()
    rerank_requests_per_minute: Limit = 0
    rerank_tokens_per_minute: Limit = 0
    provider_max_retries: Annotated[int, Field(ge=0, le=20)] = 4
    """Repeats of a request after 429, 5xx or a broken connection."""
    provider_wait_s: Annotated[float, Field(ge=0)] = 10.0
    """How long a request may wait for its turn under a limit before it goes to a fallback or is sent again later."""
    breaker_failure_threshold: Annotated[int, Field(ge=1)] = 5
    """A provider that was unavailable for so many of the last calls, twice as many, is not asked any more."""
    breaker_success_threshold: Annotated[int, Field(ge=1)] = 2
    """So many probes must succeed before all calls go to it again, and so many jobs before a node that was ejected is
    given others."""
    breaker_timeout_s: Seconds = 30.0
    """How long a provider, or a node that was ejected, is left alone before the first probe."""
    cache_url: SecretUrl | None = None
    """Where jobs keep what they computed, in a Redis that may forget it, or a Redis Cluster
    (``redis+cluster://HOST:PORT,HOST:PORT``); None: jobs keep nothing, and ``cluster.cache`` is of each process."""
    cache_ttl_s: CacheTime = 24 * 3600.0
    """How long embeddings and answers are fresh, and what tasks store without a TTL of its own."""
    cache_search_ttl_s: CacheTime = 300.0
    """How long searches are fresh in a collection that does not change."""
    cache_kept_s: Annotated[float, Field(ge=0, le=LONGEST_TTL_S)] = 24 * 3600.0
    """How long answers are kept when they are not fresh any more, for when no provider answers."""
    cache_staleness_s: Annotated[float, Field(ge=0, le=3600)] = 1.0
    """How long a process may serve what another has replaced, deleted or invalidated."""
    cache_timeout_s: CacheTime = 0.5
    """How long a cache that does not answer is waited for, before it is left alone for two seconds."""
    cache_max_value_mb: Annotated[int, Field(ge=1, le=512)] = 16
    """Larger values are not stored: one could drive all others out of Redis."""
    cache_local_entries: Annotated[int, Field(ge=1)] = 10_000
    """Of each process."""
    cache_local_mb: Annotated[int, Field(ge=1)] = 64
    """Of each process."""
    data_dir: str = "cluster-data"
    """Where collections live; every node that serves ``retrieval`` must reach it."""
    vector_url: SecretUrl | None = None
    """A Qdrant that keeps the collections, ``qdrant://HOST`` or, with TLS, ``qdrants://HOST``; None: ``data_dir``."""
    shards: Annotated[int, Field(ge=1, le=1024)] = 1
    """Of collections that are made from now on; those that exist keep theirs."""
    optimize_s: Annotated[float, Field(ge=0)] = 300.0
    """How often coordinators let a node compact the collections and bring their indexes up to date; 0: never."""
    shard_replicas: Annotated[int, Field(ge=1, le=16)] = 2
    """On so many nodes with role ``cache`` each shard is in memory, as far as there are so many; the same on all."""
    search_hedge: bool = True
    """Whether a second node that has the shards is given a search as well when the first is late with it."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Variables win over keys; no file is read."""
        return env_settings, init_settings

    @field_validator("name", mode="after")
    @classmethod
    def _check_name(cls, value: str) -> str:
        if value in ("node", "waiting", "suspect"):
            raise ValueError(f"its queues, {value}.node.…, would be lists of the cluster of the default name")
        return value

    @field_validator("broker_url", "result_backend", mode="after")
    @classmethod
    def _check_redis_url(cls, value: SecretUrl | None) -> SecretUrl | None:
        if value is None:
            return value
        scheme, separator, _ = value.get_secret_value().partition("://")
        if "cluster" in scheme:
            raise ValueError("a Redis Cluster cannot carry queues: Kombu has no transport for it; use redis://")
        if not separator or scheme not in BROKER_SCHEMES:
            known = ", ".join(f"{name}://" for name in BROKER_SCHEMES)
            raise ValueError(f"expected a URL that begins with one of {known}")
        return SecretUrl(checked_redis_url(value.get_secret_value()))

    @field_validator("registry_url", mode="after")
    @classmethod
    def _check_registry_url(cls, value: SecretUrl | None) -> SecretUrl | None:
        if value is not None:
            _check_registry(value, "memory")
        return value

    @field_validator("registry_join", mode="after")
    @classmethod
    def _check_registry_join(cls, value: dict[str, SecretUrl]) -> dict[str, SecretUrl]:
        for name, url in value.items():
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", name):
                raise ValueError(f"the name {name!r} is no word of letters, digits and any of . _ -")
            try:
                _check_registry(url)
            except ValueError as exc:
                raise ValueError(f"{name}: {exc}") from None
        return value

    @field_validator("cache_url", mode="after")
    @classmethod
    def _check_cache_url(cls, value: SecretUrl | None) -> SecretUrl | None:
        scheme, separator, _ = value.get_secret_value().partition("://") if value else ("", "", "")
        if value is None:
            return None
        if scheme in CACHE_CLUSTER_SCHEMES:
            parse_cluster_url(value.get_secret_value())
            return value
        if not separator or scheme not in BROKER_SCHEMES:
            known = ", ".join(f"{name}://" for name in (*BROKER_SCHEMES, *CACHE_CLUSTER_SCHEMES))
            raise ValueError(f"expected a URL that begins with one of {known}")
        return SecretUrl(checked_redis_url(value.get_secret_value()))

    @field_validator("vector_url", mode="after")
    @classmethod
    def _check_vector_url(cls, value: SecretUrl | None) -> SecretUrl | None:
        if value is not None:
            parse_qdrant_url(value.get_secret_value())
        return value

    @field_validator("alert_url", mode="after")
    @classmethod
    def _check_alert_url(cls, value: SecretWebhookUrl | None) -> SecretWebhookUrl | None:
        url = value.get_secret_value() if value else None
        if url is not None:
            parts = urlsplit(url)
            # Reading the port checks it.
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
                raise ValueError("expected http://HOST/… or https://HOST/…")
            if not re.fullmatch(r"[!-~]+", url):
                raise ValueError("expected printable ASCII without blanks")
        return value

    @field_validator("flower_password", mode="after")
    @classmethod
    def _check_flower_password(cls, value: SecretStr | None) -> SecretStr | None:
        # Flower takes a list, with commas between, and compares ASCII only; an empty one lets everybody in.
        if value is not None and not re.fullmatch(r"[!-+\--~]+", value.get_secret_value()):
            raise ValueError("expected printable ASCII without blanks and commas")
        return value

    @model_validator(mode="after")
    def _check_zone(self) -> Self:
        if self.zone is not None and self.metadata.get(ZONE, self.zone) != self.zone:
            raise ValueError(
                f"zone={self.zone!r}, but the metadata of this node say {self.metadata[ZONE]!r}: leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _check_lease(self) -> Self:
        if self.lease_s < 2 * self.heartbeat_s:
            raise ValueError(
                f"lease_s={self.lease_s} must be at least twice heartbeat_s={self.heartbeat_s}: "
                "one late beat would end a healthy node"
            )
        if self.lease_s < 4 * self.health_check_s:
            raise ValueError(
                f"lease_s={self.lease_s} must be at least four times health_check_s={self.health_check_s}: "
                "an observer that misses half a lease starts anew, and would never see a dead node"
            )
        if self.stuck_s is not None and self.stuck_s < self.lease_s:
            raise ValueError(
                f"stuck_s={self.stuck_s} must be at least lease_s={self.lease_s}: "
                "a worker that is held up for less than a lease is not even taken for dead"
            )
        return self

    @model_validator(mode="after")
    def _check_joined_are_others(self) -> Self:
        own = self.registry_url or self.broker_url
        same = [name for name, url in self.registry_join.items() if url.get_secret_value() == own.get_secret_value()]
        if same:
            raise ValueError(
                f"registry_join={{{same[0]!r}: {str(own)!r}}}: that is the registry of this cluster itself"
            )
        return self

    @model_validator(mode="after")
    def _check_registry_ttl(self) -> Self:
        url = self.registry_url.get_secret_value() if self.registry_url else ""
        parse = LEASES.get(url.partition("://")[0])
        if parse and parse(url).ttl_s < 2 * self.heartbeat_s:
            raise ValueError(
                f"registry_url={str(self.registry_url)!r}: its ttl must be at least twice "
                f"heartbeat_s={self.heartbeat_s}: a healthy node whose beat is late would seem gone"
            )
        return self

    @model_validator(mode="after")
    def _check_fallbacks(self) -> Self:
        for purpose in ("llm", "embedding", "rerank"):
            if getattr(self, f"{purpose}_fallbacks") and not getattr(self, f"{purpose}_base_url"):
                raise ValueError(f"{purpose}_fallbacks are set but {purpose}_base_url is not: fall back from what?")
        for fallback in self.embedding_fallbacks:
            if fallback.base_url is None or fallback.model not in (None, self.embedding_model):
                raise ValueError(
                    "embedding_fallbacks: expected another base_url with the same model: vectors of two models "
                    "cannot be compared"
                )
        return self

    @property
    def node_metadata(self) -> dict[str, str]:
        """``metadata`` of a node, its zone among them."""
        return self.metadata if self.zone is None else {**self.metadata, ZONE: self.zone}

    @property
    def stuck_after_s(self) -> float:
        """``stuck_s``, or what it stands for."""
        return self.stuck_s if self.stuck_s is not None else max(10 * self.lease_s, 30.0)

    def strategy_for(self, request_type: str) -> str:
        """The strategy of a request type: its own if one is set, else the common one."""
        own = self.strategies.get(request_type) or getattr(self, f"strategy_{request_type}", None)
        return own or self.strategy


def _check_registry(url: SecretUrl, *others: str) -> None:
    """Raise ValueError if no registry can be at a URL. Of ``others`` are schemes that are allowed as well."""
    scheme = url.get_secret_value().partition("://")[0]
    if scheme in LEASES:
        LEASES[scheme](url.get_secret_value())
    elif scheme not in (*BROKER_SCHEMES, *others):
        raise ValueError("expected redis://, rediss://, redis+socket://, sentinel://, consul:// or etcd://")


def load_settings(conf: Mapping[str, Any], environ: Mapping[str, str]) -> ClusterSettings:
    """Validate the ``cluster_*`` keys of ``conf`` under the ``CLUSTER_*`` variables of ``environ``.

    ``environ`` is looked at for misspelt names only; the values are those of the process environment.
    Raises ConfigurationError that names the key, the value and the nearest valid name.
    """
    given = {key[len(CONF_PREFIX) :]: value for key, value in conf.items() if key.startswith(CONF_PREFIX)}
    _refuse_unknown(given, environ)
    try:
        return ClusterSettings(**given)
    except ValidationError as exc:
        raise ConfigurationError(_explain(exc, given, environ)) from None


def _refuse_unknown(given: Mapping[str, Any], environ: Mapping[str, str]) -> None:
    known = ClusterSettings.model_fields
    for key in given.keys() - known.keys():
        hint = f"; did you mean '{CONF_PREFIX}{nearest}'?" if (nearest := _nearest(key)) else ""
        raise ConfigurationError(f"unknown setting {CONF_PREFIX + key}={_shown(key, given[key])}{hint}")
    for variable in environ:
        key = variable.removeprefix(ENV_PREFIX).lower()
        # A platform has variables of its own under this prefix (CLUSTER_SERVICE_HOST): only misspelt ones are errors.
        if variable.startswith(ENV_PREFIX) and key not in known and (nearest := _nearest(key, MISSPELT)):
            raise ConfigurationError(f"unknown variable {variable}; did you mean {ENV_PREFIX + nearest.upper()!r}?")


def _nearest(key: str, similarity: float = 0.6) -> str:
    """Return the setting whose name is most like ``key``, or nothing."""
    return next(iter(get_close_matches(key, ClusterSettings.model_fields, n=1, cutoff=similarity)), "")


def _explain(exc: ValidationError, given: Mapping[str, Any], environ: Mapping[str, str]) -> str:
    lines = []
    for error in exc.errors():
        message = re.sub(r"^Value error, ", "", error["msg"])
        key = str(error["loc"][0]) if error["loc"] else ""
        if len(error["loc"]) > 2:
            message = f"{'.'.join(map(str, error['loc'][1:]))}: {message}"
        if not key:
            # It is about several settings, which it calls by their fields.
            lines.append(re.sub(r"\b[a-z_]+(?==| is not| are set)", lambda word: _set_as(word[0], environ), message))
            continue
        value = environ.get(ENV_PREFIX + key.upper()) or given.get(key)
        lines.append(f"{_set_as(key, environ)}={_shown(key, value)}: {message}")
    return "; ".join(lines)


def _set_as(key: str, environ: Mapping[str, str]) -> str:
    """The name by which a setting is set: that of the variable, if there is one."""
    if key not in ClusterSettings.model_fields:
        return key
    variable = ENV_PREFIX + key.upper()
    return variable if environ.get(variable) else CONF_PREFIX + key


def _shown(key: str, value: object) -> str:
    # A misspelt key holds what the right one would.
    names = (key, _nearest(key))
    if any(word in name for name in names for word in SECRET_WORDS):
        return f"'{HIDDEN}'"
    is_url = any(word in name for name in names for word in URL_WORDS)
    return masked_url(repr(value)) if is_url else masked(repr(value))
