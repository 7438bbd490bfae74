"""The indexes of a shard's table.

``words`` is for full-text search. It splits texts at whatever is no letter or digit, ignores case and accents, reduces
English words to their stems and leaves out the commonest. Words of 41 characters and more, and writing without blanks
between words such as Chinese, are found as a whole only. Rows that were added since the index was last brought up to
date are found all the same: their texts are read by each search.
"""

from __future__ import annotations

from cluster_tasks.shards.database import Database, is_conflict, unavailable

WORDS = "words"


def keep_words(database: Database, name: str) -> None:
    """Give a table its index of words, if it has none."""
    from lancedb.index import FTS

    table = database.open(name)
    if table is None or any(index.name == WORDS for index in table.list_indices()):
        return
    with unavailable(name):
        try:
            table.create_index("text", config=FTS(), name=WORDS)
        except RuntimeError as exc:
            # Another has made it in between, or has written rows: then the next one makes it.
            if not is_conflict(exc):
                raise
