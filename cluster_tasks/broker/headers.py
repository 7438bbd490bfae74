"""What the headers of a job must be, so that no part of Celery stumbles over them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from celery.exceptions import InvalidTaskError
from pydantic import BaseModel, ConfigDict, Field, ValidationError

Text = str | None
Limit = Annotated[float, Field(allow_inf_nan=False)] | None


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


def check_job(headers: Mapping[str, Any], payload: Any) -> None:
    """Raise InvalidTaskError if a message of Celery's second protocol is not as Celery writes them.

    ``payload`` is its decoded body. Times are left to Celery, which checks them.
    """
    try:
        _Headers.model_validate(dict(headers))
    except ValidationError as exc:
        told = "; ".join(f"{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in exc.errors())
        raise InvalidTaskError(f"headers that no job can have: {told}") from None
    match payload:
        case [list() | tuple(), dict(), dict() | None]:
            return
    raise InvalidTaskError("the body of a job holds arguments, named arguments and what follows it")
