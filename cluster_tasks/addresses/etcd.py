"""What an ``etcd://`` URL says, checked part by part."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn
from urllib.parse import parse_qsl, unquote, urlsplit

from pydantic import SecretStr

from cluster_tasks.addresses.secret import SecretUrl
from cluster_tasks.errors import ConfigurationError, did_you_mean

SCHEME = "etcd"
DEFAULT_PORT = 2379
DEFAULT_PREFIX = "cluster-tasks"
DEFAULT_TTL_S = 15
TTL_S = range(2, 3_601)
"""etcd itself makes a lease of less than two seconds longer."""
PREFIX = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*")
OPTIONS = ("ca", "cert", "key", "scheme", "ttl")
TLS_OPTIONS = ("ca", "cert", "key")
Refuse = Callable[[str], NoReturn]
FORM = "etcd://[USER:PASSWORD@]HOST[:2379][,HOST…]/PREFIX[?ttl=15s&scheme=https&ca=FILE&cert=FILE&key=FILE]"


@dataclass(frozen=True, slots=True)
class EtcdUrl:
    """Where an etcd is, who one is there, and what of it is ours."""

    servers: tuple[tuple[str, int], ...]
    prefix: str
    """Begins with a slash and ends without."""
    ttl_s: int
    """How long a lease lasts that nobody keeps alive."""
    scheme: str
    user: str
    """Empty: none."""
    password: SecretStr
    ca: str | None
    """File of the authorities that are trusted; None: those that certifi knows."""
    cert: str | None
    key: str | None


def parse_etcd_url(url: SecretUrl | str) -> EtcdUrl:
    """Return what ``url`` says. Raises ConfigurationError that names the part and what it can be."""
    text = url.get_secret_value() if isinstance(url, SecretUrl) else url
    address, _, query = text.partition("://")[2].partition("?")
    host_part, _, path = address.partition("/")

    def refuse(reason: str) -> NoReturn:
        raise ConfigurationError(f"etcd:// URL: {reason}; expected {FORM}")

    credentials, _, hosts = host_part.rpartition("@")
    # The mask of a secret URL needs the @ before the first slash, and so does every reader.
    if "@" in path or "#" in address:
        refuse("a password with one of / ? # @ : is written in percent-encoding")
    user, _, password = (unquote(part) for part in credentials.partition(":"))
    if credentials and not (user and password):
        refuse("a user comes with a password, and a password with a user")
    options = _options(query, refuse)
    prefix = path.strip("/") or DEFAULT_PREFIX
    if not PREFIX.fullmatch(prefix):
        refuse(f"the prefix {prefix!r} does not match {PREFIX.pattern}")
    return EtcdUrl(
        servers=tuple(_server(host, refuse) for host in re.split("[,;]", hosts)),
        prefix=f"/{prefix}",
        ttl_s=_ttl_s(options.get("ttl", f"{DEFAULT_TTL_S}s"), refuse),
        scheme=options["scheme"],
        user=user,
        password=SecretStr(password),
        ca=options.get("ca"),
        cert=options.get("cert"),
        key=options.get("key"),
    )


def _server(host: str, refuse: Refuse) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{host}")
        name, port = parts.hostname, parts.port
    except ValueError:
        refuse(f"the port of {host!r} is a number from 1 to 65535")
    if not name or not re.fullmatch(r"[A-Za-z0-9_.:-]+", name):
        refuse(f"{host!r} names no host")
    if port == 0:
        refuse(f"the port of {host!r} is a number from 1 to 65535")
    return name, port or DEFAULT_PORT


def _options(query: str, refuse: Refuse) -> Mapping[str, str]:
    options = {"scheme": "http"}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in OPTIONS:
            refuse(f"unknown option {name!r}{did_you_mean(name, OPTIONS)}")
        if not value:
            refuse(f"the option {name} is empty")
        options[name] = value
    if options["scheme"] not in ("http", "https"):
        refuse(f"scheme={options['scheme']!r} is neither http nor https")
    if options["scheme"] == "http" and (misplaced := [name for name in TLS_OPTIONS if name in options]):
        refuse(f"{misplaced[0]} is for TLS: add scheme=https")
    if "key" in options and "cert" not in options:
        refuse("key comes with cert")
    return options


def _ttl_s(text: str, refuse: Refuse) -> int:
    found = re.fullmatch(r"(\d+)(s|m|)", text)
    ttl_s = int(found[1]) * (60 if found[2] == "m" else 1) if found else 0
    if ttl_s not in TTL_S:
        refuse(f"ttl={text!r} is not a time from 2s to 60m, in whole seconds (15s) or minutes (1m)")
    return ttl_s
