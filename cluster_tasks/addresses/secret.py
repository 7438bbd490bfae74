"""URLs that never show what is secret in them."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from pydantic import SecretStr

HIDDEN = "**********"
"""Stands for a secret of which nothing shows."""


class SecretUrl(SecretStr):
    """A URL whose passwords show as ``**`` wherever it is printed."""

    def _display(self) -> str:
        return masked_url(self.get_secret_value())


class SecretWebhookUrl(SecretUrl):
    """A URL of which only scheme and host show: what follows is often the secret."""

    def _display(self) -> str:
        parts = urlsplit(self.get_secret_value())
        return f"{parts.scheme}://{parts.hostname or ''}/**"


def masked(text: str) -> str:
    """Return ``text`` with ``**`` for every password of its URLs, before the host or in the query."""
    # Up to the last @ of each URL: a password that nobody quoted may hold any character.
    urls = [re.sub(r"(://[^:/@]*):.*@", r"\1:**@", url) for url in re.split(r";(?=[\w+]+://)", text)]
    # What is alone before the host may be a token, as it is with Consul.
    urls = [re.sub(r"(://)[^:@]*@", r"\1**@", url) for url in urls]
    return re.sub(r"((?:password|token|key|secret)=)[^&;#]*", r"\1**", ";".join(urls), flags=re.IGNORECASE)


def masked_url(text: str) -> str:
    """Return a URL as ``masked`` does, or nothing of one that is mistyped: what is before an @ may be a password."""
    shown = masked(text)
    return HIDDEN if "@" in re.sub(r"://([^:/@]*:)?\*\*@", "", shown) else shown
