"""Which URLs of a Redis are understood, and by all who read them alike."""

from __future__ import annotations

from urllib.parse import parse_qsl, urlencode

BROKER_SCHEMES = ("redis", "rediss", "redis+socket", "sentinel")
CACHE_CLUSTER_SCHEMES = ("redis+cluster", "rediss+cluster")
CERTIFICATE_CHECKS = ("required", "optional", "none")


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
