"""What a ``consul://`` URL says: which agent is asked, with which token, and how nodes show in its catalog."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, unquote, urlsplit

from cluster_tasks.errors import ConfigurationError, did_you_mean

SCHEME = "consul"
DEFAULT_PORTS = {"http": 8500, "https": 8501}
DEFAULT_SERVICE = "cluster-tasks"
DEFAULT_TTL_S = 15.0
OPTIONS = ("service", "tags", "ttl", "scheme", "verify", "ca", "cert", "key")
TLS_OPTIONS = ("verify", "ca", "cert", "key")
UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
OWN_SERVICE = "consul"
"""The name under which Consul's own servers are found."""


@dataclass(frozen=True, slots=True)
class ConsulUrl:
    """A ``consul://`` URL, checked."""

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORTS["http"]
    scheme: str = "http"
    token: str = field(default="", repr=False)
    datacenter: str = ""
    """Empty: that of the agent."""
    service: str = DEFAULT_SERVICE
    """Name of the nodes in the catalog, and first part of the keys."""
    tags: tuple[str, ...] = ()
    ttl_s: float = DEFAULT_TTL_S
    """Without a beat for so long, the check of a node turns critical."""
    verify: bool = True
    """Whether the certificate of the agent is checked."""
    ca: str | None = None
    """File with the certificate authority of the agent; None: those that the system trusts."""
    cert: str | None = None
    key: str | None = None
    """Files of the certificate that the agent wants of its clients."""


def parse_consul_url(url: str) -> ConsulUrl:
    """Read ``consul://[token@]host[:port]/[datacenter]?service=…&tags=…&ttl=…&scheme=…&verify=…&ca=…&cert=…&key=…``.

    Raises ConfigurationError that names the part and says what is expected, and never shows the token.
    """
    credentials, host, port, datacenter, query = _split(url)
    options = _options(query)
    scheme = options.get("scheme", "http")
    if scheme not in DEFAULT_PORTS:
        raise _refusal("scheme", scheme, f"expected http or https{did_you_mean(scheme, DEFAULT_PORTS)}")
    unused = [name for name in TLS_OPTIONS if name in options]
    if unused and scheme != "https":
        raise _refusal(unused[0], options[unused[0]], "it is for TLS; add scheme=https")
    if ("cert" in options) != ("key" in options):
        raise ConfigurationError("consul:// URL: cert and key come together: expected both or none")
    return ConsulUrl(
        host=host,
        port=port or DEFAULT_PORTS[scheme],
        scheme=scheme,
        token=_token(credentials),
        datacenter=_matching("datacenter", datacenter, r"[A-Za-z0-9_-]{0,64}", "letters, digits, - and _"),
        service=_service(options.get("service", DEFAULT_SERVICE)),
        tags=_tags(options.get("tags", "")),
        ttl_s=_duration("ttl", options["ttl"]) if "ttl" in options else DEFAULT_TTL_S,
        verify=_boolean("verify", options.get("verify", "true")),
        ca=options.get("ca"),
        cert=options.get("cert"),
        key=options.get("key"),
    )


def _split(url: str) -> tuple[str, str, int | None, str, str]:
    """Return token, host, port, datacenter and query. No part of the URL may show in an error before it is known."""
    unreadable = ConfigurationError(
        "consul:// URL: its host and port cannot be read; expected consul://[token@]host:8500/[datacenter], special "
        "characters written as %XX"
    )
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise unreadable from None
    if "@" in parts.path + parts.query + parts.fragment:
        # A token with a slash or a question mark: what follows that is no more than the rest of it.
        raise unreadable
    if parts.scheme != SCHEME or not parts.hostname:
        raise ConfigurationError("consul:// URL: it has no host; expected consul://[token@]host:8500/[datacenter]")
    if parts.fragment or port == 0:
        raise ConfigurationError("consul:// URL: expected consul://[token@]host:8500/[datacenter]?option=value")
    # Both token@ and, as passwords are written, :token@ will do.
    credentials = parts.netloc.rpartition("@")[0].removeprefix(":")
    return credentials, parts.hostname, port, unquote(parts.path.strip("/")), parts.query


def _options(query: str) -> Mapping[str, str]:
    pairs = parse_qsl(query, keep_blank_values=True)
    options = dict(pairs)
    for name in options:
        if name == "token":
            raise ConfigurationError("consul:// URL: the token is written before the host: consul://TOKEN@host:8500")
        if name not in OPTIONS:
            raise ConfigurationError(
                f"consul:// URL: unknown option {name!r}{did_you_mean(name, OPTIONS)}; "
                f"expected some of {', '.join(OPTIONS)}"
            )
        if not options[name] and name != "tags":
            raise _refusal(name, "", "expected a value")
    if len(options) < len(pairs):
        raise ConfigurationError("consul:// URL: an option is given twice; expected each one once")
    return options


def _token(text: str) -> str:
    token = unquote(text)
    if not re.fullmatch(r"[!-~]*", token):
        raise ConfigurationError("consul:// URL: the token has blanks or other characters than printable ASCII")
    return token


def _service(text: str) -> str:
    label = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
    name = _matching("service", text, label, "a DNS label: up to 63 letters, digits and -, not at either end")
    if name.lower() == OWN_SERVICE:
        raise _refusal("service", text, "Consul's own servers have this name; choose another")
    return name


def _tags(text: str) -> tuple[str, ...]:
    tags = [tag for tag in (part.strip() for part in text.split(",")) if tag]
    words = "letters, digits and any of . _ : = / -, separated by commas"
    return tuple(_matching("tags", tag, r"[A-Za-z0-9._:=/-]{1,128}", words) for tag in tags)


def _duration(name: str, text: str) -> float:
    """Return seconds for a number with its unit, as Consul writes durations."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h)", text)
    seconds = float(found[1]) * UNITS_S[found[2]] if found else 0.0
    if seconds <= 0:
        raise _refusal(name, text, "expected a number above 0 with its unit, ms, s, m or h, such as 15s")
    return seconds


def _boolean(name: str, text: str) -> bool:
    if text not in ("true", "false"):
        raise _refusal(name, text, "expected true or false")
    return text == "true"


def _matching(name: str, text: str, pattern: str, expected: str) -> str:
    if not re.fullmatch(pattern, text):
        raise _refusal(name, text, f"expected {expected}")
    return text


def _refusal(name: str, value: str, reason: str) -> ConfigurationError:
    return ConfigurationError(f"consul:// URL: {name}={value!r}: {reason}")
