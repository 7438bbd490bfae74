"""Which passages an answer cites, and with which of its sentences."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster_tasks.providers import ChatRequest, ExtractiveChat
from cluster_tasks.tasks.citing import cited

SPLIT = {"document": "manual.md", "passage": 3, "passages": 9, "start": 120, "heading": "Setup > Linux"}
PASSAGES = [
    {"id": "manual.md#passage-3", "text": "Backups run at two.", "metadata": {**SPLIT, "lang": "en"}, "score": 0.9},
    {"id": "sky", "text": "The sky is blue.", "metadata": {"page": "its own", "document": "no id"}, "score": 0.8},
    {"id": "hen", "text": "A hen lays eggs.", "metadata": {}, "score": 0.7},
]


def cite(text: str, count: int = 3, response_format: dict[str, Any] | None = None) -> dict[str, Any]:
    generated = {"text": text, "provider": "openai", "quotes": []}
    return cited(generated, PASSAGES[:count], response_format)


def sentences(text: str) -> dict[int, list[str]]:
    """What each passage is cited with."""
    return {
        each["number"]: [text[span["start"] : span["end"]] for span in each["spans"]]
        for each in cite(text)["citations"]
    }


def test_a_citation_names_passage_document_and_place() -> None:
    first, second = cite("The sky is blue [2]. Backups run at two [1].")["citations"]
    span = {"passage_start": None, "passage_end": None}
    assert first == {
        "number": 2, "id": "sky", "document": "sky", "heading": None, "page": None, "start": None,
        "spans": [{"start": 0, "end": 20, **span}],
    }  # fmt: skip
    assert second == {
        "number": 1, "id": "manual.md#passage-3", "document": "manual.md", "heading": "Setup > Linux", "page": None,
        "start": 120, "spans": [{"start": 21, "end": 44, **span}],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One [1]. Two [2][3]. Three.", {1: ["One [1]."], 2: ["Two [2][3]."], 3: ["Two [2][3]."]}),
        ("One. [1] Two.[2] Three. [3]", {1: ["One. [1]"], 2: ["Two.[2]"], 3: ["Three. [3]"]}),
        ("One. [1]. Two [2].", {1: ["One. [1]."], 2: ["Two [2]."]}),
        ("It is so. [2] says why.", {2: ["[2] says why."]}),
        ("One [1, 3]. Two [2; 3].", {1: ["One [1, 3]."], 3: ["One [1, 3].", "Two [2; 3]."], 2: ["Two [2; 3]."]}),
        ("All of it [1-3].", {1: ["All of it [1-3]."], 2: ["All of it [1-3]."], 3: ["All of it [1-3]."]}),
        ("Both [1\u20132].", {1: ["Both [1\u20132]."], 2: ["Both [1\u20132]."]}),
        ("Twice [1], and again [1].", {1: ["Twice [1], and again [1]."]}),
        ("- One [1]\n- Two [2]\n\n[3] says more", {1: ["- One [1]"], 2: ["- Two [2]"], 3: ["[3] says more"]}),
        (
            "\u5929\u662f\u84dd\u7684\u3002\u30101\u3011\u9e21\u3002",
            {1: ["\u5929\u662f\u84dd\u7684\u3002\u30101\u3011"]},
        ),
        ("Nothing is cited.", {}),
        ("", {}),
    ],
)
def test_a_marker_cites_with_the_sentence_it_belongs_to(text: str, expected: dict[int, list[str]]) -> None:
    assert sentences(text) == expected


def test_numbers_that_no_passage_has_are_told_apart() -> None:
    found = cite("One [1]. Two [4] and [0]. Years [2023-2025], again [4].")
    assert [each["number"] for each in found["citations"]] == [1]
    assert found["unknown_citations"] == [4, 0, 2023, 2025]
    assert cite("From [2-900000].")["unknown_citations"] == [900000]
    assert [each["number"] for each in cite("From [2-900000].")["citations"]] == [2, 3]


@pytest.mark.parametrize(
    "text",
    ["Call `items[1]`.", "Do:\n```python\nx = items[2]\n```\n", "```\nx[1]", "See [1](https://host).", "[x] [1.5] []"],
)
def test_brackets_of_code_and_links_cite_nothing(text: str) -> None:
    assert cite(text) == {"citations": [], "unknown_citations": []}


def test_lists_of_a_structured_answer_are_no_citations() -> None:
    answer = '{"values": [1, 7], "text": "so [2]"}'
    assert cite(answer, response_format={"type": "json_object"}) == {"citations": [], "unknown_citations": []}
    assert cite("So [2].", response_format={"type": "text"})["citations"][0]["number"] == 2


@given(st.text(alphabet="ab .!?\n[]12,;-`()#", max_size=60))
def test_whatever_a_model_says_its_spans_hold_the_markers(text: str) -> None:
    found = cite(text, count=2)
    assert not {each["number"] for each in found["citations"]} & set(found["unknown_citations"])
    for each in found["citations"]:
        assert each["spans"]
        for span in each["spans"]:
            assert "[" in text[span["start"] : span["end"]]
            assert span["end"] <= len(text)


TEXTS = (
    "Cats sleep. Cats purr [2]\nloudly at night. Dogs bark.",
    "Cats purr [2] loudly at night. A cat climbs.\n\nOwls hoot.",
)


def quoted(question: str, *texts: str, **given: Any) -> tuple[str, dict[str, Any]]:
    messages = ({"role": "user", "content": question},)
    result = ExtractiveChat().chat(ChatRequest(messages=messages, passages=texts, **given)).model_dump(mode="json")
    passages = [{"id": f"p{n}", "text": text, "metadata": {}, "score": 1.0} for n, text in enumerate(texts)]
    return result["text"], cited(result, passages, None)


@pytest.mark.parametrize("limit", [None, 1, 2, 4, 6, 9])
def test_sentences_of_passages_cite_where_they_are_from_exactly(limit: int | None) -> None:
    text, found = quoted("what do cats do", *TEXTS, max_tokens=limit)
    spans = [(each["number"], span) for each in found["citations"] for span in each["spans"]]
    for number, span in spans:
        said = text[span["start"] : span["end"]]
        written = TEXTS[number - 1][span["passage_start"] : span["passage_end"]]
        assert said == " ".join(written.split())
    # Together they are the answer. What the passages cite themselves is not cited here.
    assert " ".join(text[span["start"] : span["end"]] for _, span in spans) == text
    assert found["unknown_citations"] == []


def test_a_sentence_of_two_passages_cites_the_first_only() -> None:
    text, found = quoted("what do cats do at night", *TEXTS)
    assert text == "Cats purr [2] loudly at night."
    assert [each["id"] for each in found["citations"]] == ["p0"]
    assert quoted("zebra", *TEXTS)[1] == {"citations": [], "unknown_citations": []}
