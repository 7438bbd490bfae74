"""Which passages an answer cites, and with which of its sentences. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypedDict

from cluster_tasks.providers import ExtractiveChat
from cluster_tasks.providers.sentences import sentence_spans
from cluster_tasks.shards.ingest.splitting import document_of

_NUMBERS = r"\s*\d{1,6}(?:\s*[-\u2013,;]\s*\d{1,6})*\s*"
# [1](https://…) is a link. Some models were taught other brackets.
_MARKER = rf"(?:\[{_NUMBERS}\](?!\()|\u3010{_NUMBERS}\u3011)"
MARKER = re.compile(_MARKER)
# "It is so. [1] It was not.", but not: "It is so. [1] says why."
BEHIND_STOP = re.compile(rf"([.!?\u3002\uff01\uff1f])(?:[ \t]*{_MARKER})+(?![ \t]*[a-z])")
CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]+`", re.DOTALL)
HIDDEN = "\0"
"""No blank, and in no marker."""


class Span(TypedDict):
    """A sentence of an answer, from ``start`` to ``end``, in characters; and what it is in the passage, if told."""

    start: int
    end: int
    passage_start: int | None
    passage_end: int | None


class Citation(TypedDict):
    """A passage that is cited; what is not known is None."""

    number: int
    id: str
    document: str
    heading: str | None
    page: int | None
    start: int | None
    spans: list[Span]


def cited(
    generated: Mapping[str, Any], passages: Sequence[Mapping[str, Any]], response_format: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return ``citations`` and ``unknown_citations`` of what ``llm.generate`` returned for ``passages``."""
    if generated["provider"] == ExtractiveChat.name:
        # Markers in it are those of its passages, and mean something else.
        spans, unknown = _quoted(generated.get("quotes", ())), list[int]()
    elif response_format and response_format.get("type") != "text":
        # Its brackets may be lists.
        spans, unknown = {}, []
    else:
        spans, unknown = _marked(generated["text"], len(passages))
    citations = [_citation(number, passages[number - 1], found) for number, found in spans.items()]
    return {"citations": citations, "unknown_citations": unknown}


def _citation(number: int, passage: Mapping[str, Any], spans: list[Span]) -> Citation:
    document, metadata = document_of(passage["id"], passage["metadata"]), passage["metadata"]
    known = metadata if document is not None else {}
    return Citation(
        number=number, id=passage["id"], document=passage["id"] if document is None else document,
        heading=known.get("heading"), page=known.get("page"), start=known.get("start"), spans=spans,
    )  # fmt: skip


def _quoted(quotes: Sequence[Mapping[str, Any]]) -> dict[int, list[Span]]:
    spans: dict[int, list[Span]] = {}
    for quote in quotes:
        spans.setdefault(quote["passage"], []).append(
            Span(start=quote["start"], end=quote["end"], passage_start=quote["passage_start"],
                 passage_end=quote["passage_end"])
        )  # fmt: skip
    return spans


def _marked(text: str, count: int) -> tuple[dict[int, list[Span]], list[int]]:
    """Return the sentences that cite each of so many passages, and the numbers that none of these has."""
    # No place moves: what hides code is as long as that, and a stop changes places with the markers behind it.
    prose = CODE.sub(lambda code: HIDDEN * len(code[0]), text)
    stopped = BEHIND_STOP.sub(lambda found: HIDDEN * (len(found[0]) - 1) + found[1], prose)
    spans: dict[int, list[Span]] = {}
    unknown: dict[int, None] = {}
    for start, end in sentence_spans(stopped):
        for marker in MARKER.finditer(prose, start, end):
            for number in _numbers(marker[0], count):
                span = Span(start=start, end=end, passage_start=None, passage_end=None)
                if not 1 <= number <= count:
                    unknown[number] = None
                elif span not in spans.setdefault(number, []):
                    spans[number].append(span)
    return spans, list(unknown)


def _numbers(marker: str, count: int) -> Iterator[int]:
    """Yield the numbers of a marker; of a range those that passages have, and its ends."""
    for part in re.split(r"[,;]", marker[1:-1]):
        ends = [int(number) for number in re.split(r"[-\u2013]", part)]
        yield ends[0]
        if len(ends) > 1:
            yield from range(max(ends[0] + 1, 1), min(ends[-1], count + 1))
            yield ends[-1]
