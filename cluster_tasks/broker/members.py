"""One message for many jobs, its members: each has an id, a result and an end of its own.

To lists and nodes the message is a job of the members' task, under an id that nobody is told. Its header ``members``
names them, and its arguments are theirs in the same order: a pair of arguments and named arguments for each. A message
that was at work when a process died, or that was taken from its node, is split: each member that has not ended goes on
as a message of its own.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Iterator, Mapping
from typing import Any

from celery.app.task import Context
from kombu.compression import decompress
from kombu.serialization import loads
from kombu.utils.json import dumps
from kombu.utils.uuid import uuid

from cluster_tasks.broker.message import INTERRUPTED, check_payload
from cluster_tasks.broker.unpacking import too_large, unpacked_size

MEMBERS_HEADER = "members"


def member_ids(headers: Mapping[str, Any] | Any) -> list[str]:
    """The ids of the members of a message, by its headers or by its request; none if it is of one job."""
    named = headers.get(MEMBERS_HEADER) if headers is not None else None
    try:
        return [member["id"] for member in named or ()]
    except (TypeError, KeyError, IndexError):
        # Not as we write them: nobody knows whom it is for.
        return []


def named(ids: list[str]) -> list[dict[str, str]]:
    """The value of the header for these members: a job is looked for in messages by ``"id": …``."""
    return [{"id": job_id} for job_id in ids]


def member_request(request: Mapping[str, Any], job_id: str, call: Any = ((), {})) -> dict[str, Any]:
    """What the request of a message says of one member, whose arguments are ``call``."""
    args, kwargs = call
    own = {MEMBERS_HEADER: None, "id": job_id, "correlation_id": job_id, "args": args, "kwargs": kwargs}
    return {**request, **own, "root_id": _root(request, job_id), "argsrepr": _shown(request), "kwargsrepr": "{}"}


def members_of(request: Any) -> Iterator[Context]:
    """The requests of the members of a message, without their arguments, by its own; none if it is of one job."""
    for job_id in member_ids(request):
        yield Context(member_request(vars(request), job_id))


def is_to_be_split(payload: Mapping[str, Any], crashed: bool) -> bool:
    """Whether the members of a message are to go on alone; False for the message of one job."""
    interrupted = (payload["properties"].get("delivery_info") or {}).get(INTERRUPTED)
    return bool(member_ids(payload.get("headers")) and (crashed or interrupted))


def split(message: bytes, most: int = 0) -> list[dict[str, Any]]:
    """Return a message for each member of one, as it came. Raises ValueError if that cannot be read.

    Nor can it if its body has more than ``most`` bytes when it is unpacked; 0: no limit.
    """
    try:
        payload = check_payload(json.loads(message))
        headers, properties = dict(payload["headers"]), dict(payload["properties"])
        calls, _, embedded = _body(payload, most)
        ids = member_ids(headers)
        pairs = [(job_id, list(args), dict(kwargs)) for job_id, (args, kwargs) in zip(ids, calls, strict=True)]
    except Exception as exc:
        # Whatever decoders raise for what a stranger wrote.
        raise ValueError(f"a message of several jobs cannot be read: {exc!r}") from exc
    shared = {name: value for name, value in headers.items() if name not in (MEMBERS_HEADER, "compression")}
    shared.update(argsrepr=_shown(headers), kwargsrepr="{}")
    info = {**(properties.get("delivery_info") or {}), "redelivered": True}
    return [
        {
            **payload,
            "body": b64encode(dumps([args, kwargs, embedded]).encode()).decode(),
            "headers": {**shared, "id": job_id, "root_id": _root(headers, job_id)},
            "properties": {
                **properties, "body_encoding": "base64", "correlation_id": job_id, "delivery_tag": uuid(),
                "delivery_info": info,
            },
        }
        for job_id, args, kwargs in pairs
    ]  # fmt: skip


def _body(payload: Mapping[str, Any], most: int) -> Any:
    body = payload["body"]
    if payload["properties"].get("body_encoding") == "base64":
        body = b64decode(body)
    if compression := payload["headers"].get("compression"):
        if 0 < most < unpacked_size(body, compression, most):
            raise too_large(most)
        body = decompress(body, compression)
    return loads(body, payload["content-type"], payload["content-encoding"], accept={"application/json"})


def _root(headers: Mapping[str, Any], job_id: str) -> Any:
    root = headers.get("root_id")
    return job_id if root == headers["id"] else root


def _shown(headers: Mapping[str, Any]) -> str:
    return f"<of {headers['id']}>"
