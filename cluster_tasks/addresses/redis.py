"""Which URLs of a Redis are understood, and by all who read them alike."""

from __future__ import annotations

from collections.abc import Mapping
from ssl import VerifyMode
from typing import Any
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

from cluster_tasks.errors import ConfigurationError, did_you_mean

BROKER_SCHEMES = ("redis", "rediss", "redis+socket", "sentinel")
CACHE_CLUSTER_SCHEMES = ("redis+cluster", "rediss+cluster")
CERTIFICATE_CHECKS = ("required", "optional", "none")
CLUSTER_OPTIONS = ("ssl_ca_certs", "ssl_cert_reqs", "ssl_certfile", "ssl_keyfile")
"""As redis-py calls them."""
DEFAULT_PORT = 6379


def checked_redis_url(url: str) -> str:
    """Return ``url`` as Kombu, Celery and redis-py all read it. Raises ValueError for what one of them refuses."""
    scheme, rest = url.split("://", 1)
    address, _, query = rest.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    if "password" in options:
        raise ValueError("a password is written before the host: redis://:PASSWORD@HOST")
    if scheme in ("redis", "rediss"):
        database = address.rpartition("@")[2].partition("/")[2]
        if database and not database.isdigit():
            raise ValueError(f"the database, behind the last slash, is a number and not {database!r}")
    if scheme != "rediss":
        return url
    # Celery insists on this option, and knows it by other names than redis-py.
    wanted = options.get("ssl_cert_reqs", "required").lower().removeprefix("cert_")
    if wanted not in CERTIFICATE_CHECKS:
        raise ValueError(f"ssl_cert_reqs is one of {', '.join(CERTIFICATE_CHECKS)}, not {wanted!r}")
    return f"{scheme}://{address}?{urlencode({**options, 'ssl_cert_reqs': wanted})}"


def with_tls(url: str, options: object) -> str:
    """Return ``url`` with what Celery's ``broker_use_ssl`` says of TLS in it; what it says itself wins."""
    scheme, separator, rest = url.partition("://")
    if not options or not separator or scheme not in ("redis", "rediss"):
        return url
    address, _, query = rest.partition("?")
    told = dict(options) if isinstance(options, Mapping) else {}
    if "ssl_cert_reqs" in told:
        told["ssl_cert_reqs"] = _name_of_check(told["ssl_cert_reqs"])
    named = {name: told[name] for name in CLUSTER_OPTIONS if told.get(name)}
    return f"rediss://{address}?{urlencode({**named, **dict(parse_qsl(query, keep_blank_values=True))})}".rstrip("?")


def _name_of_check(value: object) -> str:
    # None is no check, as in redis-py.
    return value.name if isinstance(value, VerifyMode) else str(value or "none")


def parse_cluster_url(url: str) -> tuple[list[tuple[str, int]], dict[str, Any]]:
    """Read ``redis+cluster://[USER:PASSWORD@]HOST:PORT,HOST:PORT``; return the nodes, and redis-py's options.

    ``rediss+cluster://`` is with TLS, and may end with ``?ssl_ca_certs=FILE&…``. Raises ConfigurationError, without the
    password, for what cannot be used.
    """
    scheme, _, rest = url.partition("://")
    address, _, query = rest.partition("?")
    login, _, hosts = address.rstrip("/").rpartition("@")
    if "@" in query:
        raise ConfigurationError(f"{scheme}://: a password with one of / ? # @ : is written in percent-encoding")
    user, _, password = login.partition(":")
    options = _tls_options(scheme, query)
    if user:
        options["username"] = unquote(user)
    if password:
        options["password"] = unquote(password)
    return [_node(scheme, host) for host in hosts.split(",")], options


def _node(scheme: str, host: str) -> tuple[str, int]:
    try:
        parts = urlsplit(f"redis://{host}")
        if parts.hostname and not (parts.path or parts.query or parts.fragment):
            return parts.hostname, parts.port or DEFAULT_PORT
    except ValueError:
        pass
    raise ConfigurationError(f"{scheme}://: expected HOST:PORT,HOST:PORT,… and not {host!r} among them")


def _tls_options(scheme: str, query: str) -> dict[str, Any]:
    options: dict[str, Any] = dict(parse_qsl(query, keep_blank_values=True))
    for name in options:
        if name not in CLUSTER_OPTIONS:
            raise ConfigurationError(
                f"{scheme}://: unknown option {name!r}{did_you_mean(name, CLUSTER_OPTIONS)}; "
                f"expected some of {', '.join(CLUSTER_OPTIONS)}"
            )
    if not scheme.startswith("rediss"):
        if options:
            raise ConfigurationError(f"{scheme}://: {next(iter(options))} is for TLS: write rediss+cluster://")
        return {}
    if options.get("ssl_cert_reqs", "required") not in CERTIFICATE_CHECKS:
        raise ConfigurationError(f"{scheme}://: ssl_cert_reqs is one of {', '.join(CERTIFICATE_CHECKS)}")
    return {"ssl": True, **options}
