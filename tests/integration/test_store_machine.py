"""A collection against a model of it, through every order of writes, splits, compactions and drops."""

from __future__ import annotations

from datetime import timedelta
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cluster_tasks.errors import CollectionNotFound
from cluster_tasks.shards.documents import Document
from cluster_tasks.shards.store import CollectionStore

MODEL = "model-a"
WORDS = ["apple", "birch", "cedar"]
IDS = st.sampled_from([f"id{n}" for n in range(12)] + ["it's", "é😀", "\\"])
TEXTS = st.lists(st.sampled_from(WORDS), min_size=1, max_size=3).map(" ".join)
SHARDS = st.integers(1, 5)


class StoreMachine(RuleBasedStateMachine):
    """The model: id → text and number."""

    @initialize(shards=SHARDS)
    def start(self, shards: int) -> None:
        self.folder = TemporaryDirectory()
        self.store = CollectionStore(self.folder.name, shards)
        self.model: dict[str, tuple[str, int]] = {}
        self.exists = False

    @rule(texts=st.dictionaries(IDS, TEXTS, min_size=1, max_size=6), number=st.integers(0, 3))
    def upsert(self, texts: dict[str, str], number: int) -> None:
        documents = [Document(id=name, text=text, metadata={"n": number}) for name, text in texts.items()]
        assert self.store.upsert("docs", documents, np.ones((len(texts), 3)), MODEL) == len(texts)
        self.model |= {name: (text, number) for name, text in texts.items()}
        self.exists = True

    @precondition(lambda self: self.exists)
    @rule(ids=st.none() | st.lists(IDS, max_size=5), number=st.none() | st.integers(0, 3))
    def delete(self, ids: list[str] | None, number: int | None) -> None:
        if ids is None and number is None:
            return
        gone = {
            name
            for name, (_, held) in self.model.items()
            if (ids is None or name in ids) and (number is None or held == number)
        }
        where: dict[str, Any] | None = None if number is None else {"n": number}
        assert self.store.delete("docs", ids, where) == len(gone)
        self.model = {name: held for name, held in self.model.items() if name not in gone}

    @precondition(lambda self: self.exists)
    @rule(shards=SHARDS)
    def split(self, shards: int) -> None:
        assert self.store.split("docs", shards).shards == shards

    @precondition(lambda self: self.exists)
    @rule(kept_s=st.sampled_from([0, 600]))
    def optimize(self, kept_s: int) -> None:
        assert self.store.optimize("docs", kept=timedelta(seconds=kept_s))

    @precondition(lambda self: self.exists)
    @rule()
    def drop(self) -> None:
        self.store.drop("docs")
        self.model, self.exists = {}, False

    @rule(shards=SHARDS)
    def another_process_goes_on(self, shards: int) -> None:
        self.store = CollectionStore(self.folder.name, shards)

    @invariant()
    def every_search_agrees_with_the_model(self) -> None:
        if not self.exists:
            assert self.store.collections() == []
            try:
                self.store.count("docs")
            except CollectionNotFound:
                return
            raise AssertionError("a collection that is not there was counted")
        layout = self.store.layout("docs")
        passages = self.store.search("docs", np.ones(3), 100)
        assert {each.id: (each.text, each.metadata["n"]) for each in passages} == self.model
        assert [each.id for each in passages] == sorted(self.model)
        parts = [self.store.count("docs", shards=[shard]) for shard in range(layout.shards)]
        assert sum(parts) == self.store.count("docs") == len(self.model)
        for word in WORDS:
            found = {each.id for each in self.store.search("docs", text=word, k=100, where={"n": {"gte": 2}})}
            assert found == {name for name, (text, number) in self.model.items() if word in text and number >= 2}

    def teardown(self) -> None:
        self.folder.cleanup()


TestStore = StoreMachine.TestCase
TestStore.settings = settings(
    max_examples=15, stateful_step_count=12, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
