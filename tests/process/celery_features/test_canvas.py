"""Signatures that call one another: chains, groups, chords, links, replacements, stamps."""

from __future__ import annotations

from typing import Any

import pytest
from celery import chain, chord, group, states
from celery.canvas import StampingVisitor
from celery.exceptions import ChordError

from tests.process.celery_features.conftest import END_S, Gate, Jobs, values
from tests.waiting import wait_until


def get(canvas: Any) -> Any:
    """Send a canvas and wait for its value."""
    return canvas.apply_async().get(timeout=END_S)


def test_a_chain_of_chains_is_one_chain(jobs: Jobs) -> None:
    assert get(chain(jobs.add.s(1, 1) | jobs.add.s(1), chain(jobs.add.s(1)), jobs.add.s(1))) == 5


def test_a_chain_keeps_the_results_of_its_steps(jobs: Jobs) -> None:
    result = chain(jobs.add.s(1, 1), jobs.add.s(1), jobs.add.s(1)).delay()
    assert result.get(timeout=END_S) == 4
    assert [result.parent.get(timeout=END_S), result.parent.parent.get(timeout=END_S)] == [3, 2]


def test_a_job_knows_its_root_and_its_parent(jobs: Jobs) -> None:
    result = chain(jobs.echo.s(0), jobs.describe.s(), jobs.describe.si()).delay()
    last, middle, first = result.get(timeout=END_S), result.parent, result.parent.parent
    assert (last["root_id"], last["parent_id"]) == (first.id, middle.id)
    assert middle.get(timeout=END_S)["parent_id"] == first.id


def test_an_immutable_signature_does_not_take_the_value_before_it(jobs: Jobs) -> None:
    assert get(jobs.echo.s(1) | jobs.add.si(2, 3)) == 5


def test_a_partial_signature_is_completed_when_it_is_called(jobs: Jobs) -> None:
    partial = jobs.add.s(1)
    assert values([partial.delay(2), partial.apply_async((3,)), partial.clone((4,)).delay()]) == [3, 4, 5]


def test_a_failed_step_ends_a_chain(jobs: Jobs) -> None:
    result = chain(jobs.echo.s("start"), jobs.fail.s(), jobs.note.s("never reached")).delay()
    with pytest.raises(ValueError, match="start"):
        result.get(timeout=END_S)
    assert result.parent.parent.state == states.SUCCESS
    assert jobs.notes("never reached") == []


def test_a_group_at_the_end_of_a_chain_gives_all_its_values(jobs: Jobs) -> None:
    assert get(jobs.echo.s(1) | group(jobs.add.s(1), jobs.add.s(2))) == [2, 3]


def test_two_groups_in_a_chain_are_two_chords(jobs: Jobs) -> None:
    first, second = group(jobs.add.s(1), jobs.add.s(2)), group(jobs.total.s(), jobs.total.s())
    assert get(jobs.echo.s(1) | first | second) == [5, 5]


def test_a_group_of_chains_gives_the_last_value_of_each(jobs: Jobs) -> None:
    assert get(group(jobs.add.s(number, 1) | jobs.add.s(10) for number in range(3))) == [11, 12, 13]


def test_a_group_of_groups_is_one_group(jobs: Jobs) -> None:
    assert get(group(group(jobs.echo.s(1), jobs.echo.s(2)), group(jobs.echo.s(3)), jobs.echo.s(4))) == [1, 2, 3, 4]


def test_an_empty_group_is_ready_at_once(jobs: Jobs) -> None:
    assert get(group()) == []


def test_a_group_of_one_is_a_list_of_one_alone_and_a_single_job_in_a_chain(jobs: Jobs) -> None:
    assert get(group(jobs.add.s(1, 1))) == [2]
    assert get(jobs.echo.s(1) | group(jobs.add.s(1)) | jobs.echo.s()) == 2


def test_group_members_have_the_keywords_of_the_call(jobs: Jobs) -> None:
    assert group(jobs.add.s(1), jobs.add.s(2)).apply_async(kwargs={"y": 10}).get(timeout=END_S) == [11, 12]


def test_a_chord_without_parts_calls_its_body(jobs: Jobs) -> None:
    assert get(chord([], jobs.total.s())) == 0


def test_a_chord_of_one_part_gives_its_body_a_list(jobs: Jobs) -> None:
    assert get(chord([jobs.add.s(1, 1)], jobs.echo.s())) == [2]


def test_a_chord_takes_a_hundred_parts_from_a_generator_and_keeps_their_order(jobs: Jobs) -> None:
    assert get(chord((jobs.echo.s(number) for number in range(100)), jobs.echo.s())) == list(range(100))


def test_a_chord_of_chains_waits_for_their_ends(jobs: Jobs) -> None:
    assert get(chord([jobs.add.s(1, 1) | jobs.add.s(1), jobs.add.s(1, 1)], jobs.total.s())) == 5


def test_the_body_of_a_chord_may_be_a_chain_a_group_or_a_chord(jobs: Jobs) -> None:
    parts = [jobs.add.s(1, 1), jobs.add.s(2, 2)]
    assert get(chord(parts, jobs.total.s() | jobs.add.s(1))) == 7
    assert get(chord(parts, group(jobs.total.s(), jobs.echo.s()))) == [6, [2, 4]]
    assert get(chord(parts, chord([jobs.total.s(), jobs.total.s()], jobs.total.s()))) == 12


def test_a_chord_is_part_of_a_chord(jobs: Jobs) -> None:
    inner = chord([jobs.add.s(1, 1), jobs.add.s(2, 2)], jobs.total.s())
    assert get(chord([inner, jobs.echo.s(1)], jobs.total.s())) == 7


def test_chords_follow_one_another_in_a_chain(jobs: Jobs) -> None:
    step = chord([jobs.add.s(1), jobs.add.s(2)], jobs.total.s())
    assert get(chain(jobs.echo.s(0), step, step, step)) == 21


def test_a_chord_that_misses_a_part_fails_and_says_which(jobs: Jobs) -> None:
    parts = [jobs.echo.s(1), jobs.fail.s("part"), jobs.echo.s(2)]
    result = chord(parts, jobs.note.s("a body that never runs")).delay()
    wait_until(result.ready, END_S, "the chord ends")
    assert isinstance(result.result, ChordError)
    assert "refused ['part']" in str(result.result)
    assert jobs.notes("a body that never runs") == []


def test_the_error_links_of_a_chords_body_run_when_a_part_fails(jobs: Jobs) -> None:
    body = jobs.total.s().on_error(jobs.old_errback.s("body missed a part"))
    result = chord([jobs.echo.s(1), jobs.fail.s()], body).delay()
    assert jobs.wait_for_notes("body missed a part") == [result.id]


def test_a_failed_chord_ends_its_chain(jobs: Jobs) -> None:
    parts = group(jobs.echo.s(1), jobs.fail.s())
    result = chain(parts, jobs.total.s(), jobs.note.s("after a failed chord")).delay()
    wait_until(result.ready, END_S, "the chain ends")
    assert isinstance(result.result, ChordError)
    assert jobs.notes("after a failed chord") == []


def test_a_part_of_a_chord_that_retries_counts_once(jobs: Jobs) -> None:
    tries, value = get(chord([jobs.flaky.s(2), jobs.echo.s("once")], jobs.echo.s()))
    assert [retries for retries, *_ in tries] == [0, 1, 2]
    assert value == "once"


def test_a_part_can_enlarge_its_chord(jobs: Jobs) -> None:
    assert get(chord([jobs.enlarge_chord.s(1), jobs.echo.s(2)], jobs.total.s())) == 1 + 2 + 101


def test_chunks_map_and_starmap_call_a_task_for_each_item(jobs: Jobs) -> None:
    pairs = [(number, number) for number in range(6)]
    assert get(jobs.add.chunks(pairs, 2).group()) == [[0, 2], [4, 6], [8, 10]]
    assert get(jobs.total.map([[1, 2], [3]])) == [3, 3]
    assert get(jobs.add.starmap(pairs)) == [0, 2, 4, 6, 8, 10]


def test_map_is_balanced_as_the_task_that_it_calls(jobs: Jobs, gate: Gate, busy: list[Any]) -> None:
    result = jobs.total.map([[1, 2], [3]]).apply_async()
    assert not jobs.cluster.client.llen("celery")
    assert sum(jobs.cluster.epochs.lengths().values()) == 1
    gate.open()
    assert result.get(timeout=END_S) == [3, 3]


def test_every_link_gets_the_value(jobs: Jobs) -> None:
    result = jobs.add.apply_async((1, 1), link=[jobs.note.s("links"), jobs.add.s(1) | jobs.note.s("links")])
    assert result.get(timeout=END_S) == 2
    assert sorted(jobs.wait_for_notes("links", 2)) == [2, 3]


def test_the_link_of_a_group_runs_without_its_values(jobs: Jobs) -> None:
    linked = group(jobs.echo.s("first"), jobs.echo.s("second"))
    linked.link(jobs.note.si("a group began to end", "link of a group"))
    assert get(linked) == ["first", "second"]
    assert jobs.wait_for_notes("link of a group") == ["a group began to end"]


def test_an_error_callback_of_the_old_style_gets_the_id(jobs: Jobs) -> None:
    result = jobs.fail.apply_async(link_error=jobs.old_errback.s("old"))
    assert jobs.wait_for_notes("old") == [result.id]


def test_an_error_callback_of_the_new_style_gets_request_and_error(jobs: Jobs) -> None:
    result = jobs.fail.apply_async(("now",), link_error=jobs.new_errback.s())
    failed, error = jobs.wait_for_notes(f"errback:{result.id}")[0]
    assert (failed, "refused ['now']" in error) == (result.id, True)


def test_an_immutable_error_callback_gets_nothing(jobs: Jobs) -> None:
    jobs.fail.apply_async(link_error=jobs.note.si("it failed", "immutable"))
    assert jobs.wait_for_notes("immutable") == ["it failed"]


def test_the_error_callback_of_a_chain_runs_for_whatever_step_fails(jobs: Jobs) -> None:
    canvas = chain(jobs.echo.s(1), jobs.fail.s(), jobs.echo.s())
    canvas.link_error(jobs.new_errback.s(key="step"))
    result = canvas.apply_async()
    assert jobs.wait_for_notes("step")[0][0] == result.parent.id


def test_an_error_callback_that_retries_ends(jobs: Jobs) -> None:
    result = jobs.fail.apply_async(link_error=jobs.count_down.si(2) | jobs.note.s("errback that retries"))
    with pytest.raises(ValueError, match="refused"):
        result.get(timeout=END_S)
    assert jobs.wait_for_notes("errback that retries") == [2]


def test_a_job_can_be_replaced_by_any_canvas(jobs: Jobs) -> None:
    parts = group(jobs.add.s(1, 1), jobs.add.s(2, 2))
    assert get(jobs.become.s(jobs.add.s(1, 1))) == 2
    assert get(jobs.become.s(jobs.add.s(1, 1) | jobs.add.s(1))) == 3
    assert get(jobs.become.s(parts)) == [2, 4]
    assert get(jobs.become.s(chord(parts, jobs.total.s()))) == 6
    assert get(jobs.become.s(jobs.become.s(jobs.echo.s("twice")))) == "twice"


def test_a_step_of_a_chain_can_be_replaced_by_any_canvas(jobs: Jobs) -> None:
    parts = group(jobs.add.s(1, 1), jobs.add.s(2, 2))
    assert get(chain(jobs.echo.s(0), jobs.become.si(jobs.add.s(1, 1) | jobs.add.s(1)), jobs.add.s(1))) == 4
    assert get(chain(jobs.echo.s(0), jobs.become.si(parts), jobs.total.s())) == 6
    assert get(chain(jobs.become.s(chord(parts, jobs.total.s())), jobs.add.s(1))) == 7


def test_a_part_of_a_chord_or_group_can_be_replaced(jobs: Jobs) -> None:
    replaced = jobs.become.si(jobs.add.s(1, 1) | jobs.add.s(1))
    assert get(chord([replaced, jobs.echo.s(1)], jobs.total.s())) == 4
    assert get(group(replaced, jobs.echo.s(1))) == [3, 1]
    assert get(chord([jobs.echo.s(1)], jobs.become.si(jobs.add.s(2, 2)))) == 4


def test_a_replaced_job_keeps_its_links(jobs: Jobs) -> None:
    result = jobs.become.apply_async((jobs.add.s(1, 1),), link=jobs.note.s("link of the replaced"))
    assert result.get(timeout=END_S) == 2
    assert jobs.wait_for_notes("link of the replaced") == [2]
    jobs.become.apply_async((jobs.fail.s(),), link_error=jobs.old_errback.s("errback of the replaced"))
    assert jobs.wait_for_notes("errback of the replaced")


def test_stamps_reach_every_job_of_a_canvas_and_its_retries(jobs: Jobs) -> None:
    class Tenant(StampingVisitor):
        def on_signature(self, sig: Any, **headers: Any) -> dict[str, Any]:
            return {"tenant": "anna", "stamped_headers": ["tenant"]}

    canvas = chain(jobs.describe.si(), group(jobs.describe.si(), jobs.describe.si()), jobs.echo.s())
    canvas.stamp(visitor=Tenant())
    result = canvas.apply_async()
    described = [*result.get(timeout=END_S), result.parent.parent.get(timeout=END_S)]
    assert [told["stamps"]["tenant"] for told in described] == ["anna"] * 3


def test_a_stamp_without_a_visitor_reaches_the_job(jobs: Jobs) -> None:
    signature = jobs.describe.s()
    signature.stamp(tenant="bert")
    assert get(signature)["stamps"] == {"tenant": "bert"}


def test_a_signature_survives_its_way_through_json(jobs: Jobs) -> None:
    canvas = chord([jobs.add.s(1, 1), jobs.add.s(2, 2) | jobs.add.s(1)], jobs.total.s())
    assert get(jobs.app.signature(jobs.app.signature(dict(canvas)))) == 7


def test_chains_groups_and_chords_of_a_canvas_meet_at_any_depth(jobs: Jobs) -> None:
    inner = group(jobs.add.s(1), jobs.add.s(2) | group(jobs.add.s(1), jobs.add.s(2)) | jobs.total.s())
    assert get(jobs.echo.s(1) | inner | jobs.total.s() | jobs.add.s(1)) == 2 + (4 + 5) + 1
