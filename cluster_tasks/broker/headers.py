"""What the headers of a job must be, so that no part of Celery stumbles over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from celery.exceptions import InvalidTaskError
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

Text = str | None
Limit = Annotated[float, Field(allow_inf_nan=False)] | None


def _nameable(job_id: str) -> str:
    # Half of a surrogate pair can be no part of the name of a key; the error is a ValueError.
    job_id.encode()
    return job_id


class _Member(BaseModel):
    model_config = ConfigDict(strict=True)

    id: Annotated[str, Field(min_length=1), AfterValidator(_nameable)]


class _Headers(BaseModel):
    # As they are: what is not of the type that Celery writes is not converted there either.
    model_config = ConfigDict(strict=True)

    task: str
    id: Annotated[str, Field(min_length=1)]
    timelimit: Annotated[list[Limit], Field(min_length=2, max_length=2)] | None = None
    retries: int | None = None
    replaced_task_nesting: int | None = None
    group: Text = None
    group_index: int | None = None
    root_id: Text = None
    parent_id: Text = None
    shadow: Text = None
    stamped_headers: list[str] | None = None
    stamps: dict[str, Any] | None = None
    members: list[_Member] | None = None


def check_job(headers: Mapping[str, Any], payload: Any) -> None:
    """Raise InvalidTaskError if a message of Celery's second protocol is not as Celery writes them.

    ``payload`` is its decoded body. Times are left to Celery, which checks them.
    """
    try:
        members = _Headers.model_validate(dict(headers)).members
    except ValidationError as exc:
        told = "; ".join(f"{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in exc.errors())
        raise InvalidTaskError(f"headers that no job can have: {told}") from None
    match payload:
        case [list() | tuple() as args, dict(), dict() | None] if members is None or _are_calls(args, len(members)):
            return
    raise InvalidTaskError("the body of a job holds arguments, named arguments and what follows it")


def _are_calls(args: Sequence[Any], count: int) -> bool:
    """Whether these are the arguments of so many jobs."""
    return len(args) == count and all(
        isinstance(call, list | tuple)
        and len(call) == 2
        and isinstance(call[0], list | tuple)
        and isinstance(call[1], dict)
        for call in args
    )
