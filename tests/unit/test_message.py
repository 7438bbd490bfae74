"""What is taken for a message of a job, whoever wrote it."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from celery.exceptions import InvalidTaskError
from hypothesis import given
from hypothesis import strategies as st

from cluster_tasks.broker.headers import check_job
from cluster_tasks.broker.members import member_ids
from cluster_tasks.broker.message import Delivery, check_payload, replace_message
from cluster_tasks.keys import Keys
from cluster_tasks.model import check_node_id, check_request_type
from tests.broker import make_message

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
BODY = [[], {}, {}]


@pytest.mark.parametrize("job_id", [5, ["a"], {"a": 1}, True, "\ud800", "a\udfffb"])
def test_an_id_that_can_be_no_name_of_a_key_is_refused(job_id: Any) -> None:
    with pytest.raises(ValueError, match=r"no text|surrogates"):
        check_payload({"properties": {}, "headers": {"id": job_id}})


@given(st.sampled_from(["id", "task", "timelimit", "retries", "group", "stamps", "eta"]), JSON, JSON)
def test_whatever_a_part_holds_it_is_taken_or_refused_and_nothing_else(name: str, value: Any, whole: Any) -> None:
    message = json.loads(make_message("1"))
    message["headers"][name] = value
    for given_message in (message, {**message, "properties": whole}, {**message, "headers": whole}, whole):
        try:
            placement = replace_message(json.dumps(given_message).encode(), Keys(), delivered=True)
        except ValueError:
            continue
        placement.job_id.encode()
    try:
        check_job(message["headers"], whole)
    except InvalidTaskError:
        return


def test_what_celery_writes_is_taken() -> None:
    message = json.loads(make_message("1"))
    check_job(message["headers"], BODY)
    check_job({**message["headers"], "timelimit": [1, 0.5], "retries": 2, "future": "header"}, BODY)
    assert check_payload(message) is message


@pytest.mark.parametrize("token", [5, "a/b", [], ["a", "b"], ["a", "b", 3], {"a": 1}, True, [["a"], "b", "c"]])
def test_a_forged_delivery_is_none(token: Any) -> None:
    assert Delivery.of({"cluster_delivery": token}) is None


@pytest.mark.parametrize(
    ("members", "args"),
    [
        ([{"id": "a"}], []),
        ([{"id": "a"}], [[[], {}], [[], {}]]),
        ([{"id": "a"}], [[[], []]]),
        ([{"id": "a"}], [["text", {}]]),
        ([{"id": "a"}], ["no call"]),
        ([{"id": ""}], [[[], {}]]),
        ([{"id": 5}], [[[], {}]]),
        ([{"id": "\ud800"}], [[[], {}]]),
        (["a"], [[[], {}]]),
        ({"id": "a"}, [[[], {}]]),
        (5, []),
    ],
)
def test_a_message_of_many_jobs_that_nobody_wrote_so_is_refused(members: Any, args: Any) -> None:
    with pytest.raises(InvalidTaskError):
        check_job({"task": "jobs.work", "id": "message", "members": members}, [args, {}, {}])


@given(JSON)
def test_whatever_is_named_as_members_some_or_none_are_found(members: Any) -> None:
    found = member_ids({"members": members})
    assert found == [] or len(found) == len(members)


@pytest.mark.parametrize("depth", [900, 1_000, 5_000, 100_000])
def test_a_message_nested_too_deeply_is_at_most_no_message(depth: int) -> None:
    nested = b'{"properties": {}, "body": ' + b"[" * depth + b"]" * depth + b"}"
    for delivered in (True, False):
        # Where the limit lies depends on Python, and on how full the stack is.
        with suppress(ValueError):
            replace_message(nested, Keys(), delivered=delivered)


@pytest.mark.parametrize(
    "name", ["a b", "a*", "a/b", "a:b", "[a]", "a\n", "a\x06\x163", "%s", "ü", "", "a" * 129, "a?.bound"]
)
def test_a_name_that_could_leave_its_name_space_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="node id"):
        check_node_id(name)
    with pytest.raises(ValueError, match="request type"):
        check_request_type(name)
