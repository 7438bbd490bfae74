"""What a ``qdrant://`` URL says, checked part by part."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn
from urllib.parse import parse_qsl, unquote, urlsplit

from pydantic import SecretStr

from cluster_tasks.errors import ConfigurationError, did_you_mean

SCHEMES = ("qdrant", "qdrants")
DEFAULT_PORT = 6333
DEFAULT_PREFIX = "cluster-tasks"
PREFIX = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
FORM = "qdrant[s]://[:APIKEY@]HOST[:6333][/PREFIX][?ca=FILE], or for one process qdrant:///FOLDER"
Refuse = Callable[[str], NoReturn]


@dataclass(frozen=True, slots=True)
class QdrantUrl:
    """Where a Qdrant is, and what of it is ours; or the folder of one that runs in this process."""

    host: str
    """Empty: there is no server."""
    port: int
    tls: bool
    key: SecretStr
    """Empty: none."""
    prefix: str
    """Of the names of our collections there, before a dot."""
    ca: str | None
    """File of the authorities that are trusted; None: those that certifi knows."""
    folder: str
    """Of a Qdrant in this process; empty: there is a server."""

    def __str__(self) -> str:
        """Return where it is, without the key."""
        return f"qdrant://{self.folder}" if self.folder else f"qdrant{'s' * self.tls}://{self.host}:{self.port}"


def parse_qdrant_url(url: str) -> QdrantUrl:
    """Return what ``url`` says. Raises ConfigurationError that names the part and what it can be, never the key."""

    def refuse(reason: str) -> NoReturn:
        raise ConfigurationError(f"qdrant:// URL: {reason}; expected {FORM}")

    scheme, separator, rest = url.partition("://")
    address, _, query = rest.partition("?")
    host_part, slash, path = address.partition("/")
    if scheme not in SCHEMES or not separator:
        refuse("it begins with qdrant:// or, with TLS, qdrants://")
    # The mask of a secret URL needs the @ before the first slash, and so does every reader.
    if "@" in path + query or "#" in address:
        refuse("a key with one of / ? # @ : is written in percent-encoding")
    ca = _ca(scheme, query, refuse)
    if not host_part:
        folder = unquote(slash + path).rstrip("/")
        if not folder or scheme != "qdrant" or query or "\0" in folder:
            refuse("without a host it names the folder of a Qdrant in this process, and nothing else")
        return QdrantUrl("", 0, False, SecretStr(""), DEFAULT_PREFIX, None, folder)
    credentials, _, server = host_part.rpartition("@")
    host, port = _server(server, refuse)
    prefix = unquote(path.strip("/")) or DEFAULT_PREFIX
    if not PREFIX.fullmatch(prefix):
        refuse(f"the prefix {prefix!r} does not match {PREFIX.pattern}")
    return QdrantUrl(host, port, scheme == "qdrants", _key(credentials, refuse), prefix, ca, "")


def _server(text: str, refuse: Refuse) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{text}")
        host, port = parts.hostname, parts.port
    except ValueError:
        refuse("the port is a number from 1 to 65535")
    if not host or not re.fullmatch(r"[A-Za-z0-9_.:-]+", host):
        refuse(f"{text!r} names no host")
    if port == 0:
        refuse("the port is a number from 1 to 65535")
    # An address of IPv6 keeps its brackets: it is put into a URL again.
    return f"[{host}]" if ":" in host else host, port or DEFAULT_PORT


def _key(credentials: str, refuse: Refuse) -> SecretStr:
    # Both KEY@ and, as passwords are written, :KEY@ will do.
    key = unquote(credentials.removeprefix(":"))
    if ":" in credentials.removeprefix(":"):
        refuse("a key has no user: write :APIKEY@")
    if not re.fullmatch(r"[!-~]*", key):
        refuse("the key has blanks or other characters than printable ASCII")
    return SecretStr(key)


def _ca(scheme: str, query: str, refuse: Refuse) -> str | None:
    options = dict(parse_qsl(query, keep_blank_values=True))
    for name, value in options.items():
        if name in ("api_key", "api-key", "key", "token"):
            refuse("the key is written before the host")
        if name != "ca":
            refuse(f"unknown option {name!r}{did_you_mean(name, ['ca'])}")
        if not value:
            refuse("the option ca is empty")
        if scheme != "qdrants":
            refuse("ca is for TLS: write qdrants://")
    return options.get("ca")
