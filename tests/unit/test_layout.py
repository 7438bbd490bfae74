"""How documents are divided among shards, without a database."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster_tasks.errors import CollectionMismatch, InvalidArguments
from cluster_tasks.shards.layout import MAX_SHARDS, TABLE, Layout, check_shards, generations, shard_of

LAYOUT = Layout("docs", 3, 4, "model-a", 8)
ids = st.text(max_size=20)


def test_the_shard_of_a_document_never_changes() -> None:
    # Documents that were stored by these are looked for by these.
    assert [shard_of(name, 1024) for name in ("a", "it's", "é😀", "\0", "")] == [559, 48, 758, 584, 692]


@given(st.sets(ids), st.integers(1, MAX_SHARDS))
def test_each_document_has_one_shard(names: set[str], shards: int) -> None:
    layout = Layout("docs", 1, shards, "m", 1)
    divided = layout.divide({name: name for name in names})
    assert sorted(name for part in divided.values() for name in part) == sorted(names)
    assert all(shard_of(name, shards) == shard for shard, part in divided.items() for name in part)


@given(ids, st.integers(1, MAX_SHARDS // 2))
def test_twice_as_many_shards_divide_each_shard_in_two(name: str, shards: int) -> None:
    assert shard_of(name, 2 * shards) % shards == shard_of(name, shards)


def test_shards_are_about_equally_full() -> None:
    layout = Layout("docs", 1, 16, "m", 1)
    sizes = [len(part) for part in layout.divide({f"document-{n}": n for n in range(16_000)}).values()]
    assert len(sizes) == 16
    assert all(900 < size < 1100 for size in sizes)


def test_some_shards_are_chosen_once_each_and_none_that_is_not_there() -> None:
    assert LAYOUT.chosen(None) == [0, 1, 2, 3]
    assert LAYOUT.chosen([3, 1, 3]) == [1, 3]
    assert LAYOUT.chosen([]) == []
    assert LAYOUT.divide({"a": 1, "b": 2}, []) == {}
    for wrong in (4, -1):
        with pytest.raises(InvalidArguments, match="has 4 shards"):
            LAYOUT.chosen([0, wrong])


@pytest.mark.parametrize("number", [0, -1, MAX_SHARDS + 1])
def test_a_number_of_shards_out_of_range_is_refused(number: int) -> None:
    with pytest.raises(InvalidArguments, match="shards"):
        check_shards(number)


def test_tables_are_told_from_those_of_other_collections_and_generations() -> None:
    names = [LAYOUT.table(shard) for shard in range(2)]
    assert names == ["docs.g3.0of4", "docs.g3.1of4"]
    assert all(TABLE.fullmatch(name) for name in names)
    others = ["docs.g10.0of1", "docs-2.g3.0of4", "_catalogue", "docs", "docs.g3.0of4x"]
    assert generations([*names, *others], "docs") == {3: names, 10: ["docs.g10.0of1"]}


def test_another_model_or_dimension_does_not_fit() -> None:
    LAYOUT.check_fit(8)
    LAYOUT.check_fit(8, "model-a")
    for dimensions, model in ((7, None), (8, "model-b")):
        with pytest.raises(CollectionMismatch, match="8 dimensions by 'model-a'"):
            LAYOUT.check_fit(dimensions, model)
