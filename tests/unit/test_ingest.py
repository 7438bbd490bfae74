"""Files become texts, texts become passages: which, from where, and how they are told apart."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from semantic_text_splitter import TextSplitter

from cluster_tasks.errors import UnreadableFile
from cluster_tasks.shards.documents import Document
from cluster_tasks.shards.ingest import files
from cluster_tasks.shards.ingest.files import Selection, find, read_bytes
from cluster_tasks.shards.ingest.headings import MAX_HEADING, Headings
from cluster_tasks.shards.ingest.readers import Format, read, read_pdf
from cluster_tasks.shards.ingest.splitting import TOKENIZER, Split, document_of, split
from cluster_tasks.shards.ingest.wholes import Whole, wholes
from tests.documents import pdf

# Which files.


def fill(folder: Path, *paths: str) -> None:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(f"text of {path}")


def test_files_of_known_kinds_are_found_in_order_and_hidden_ones_are_not(tmp_path: Path) -> None:
    wanted = ["A.MD", "b/c.html", "b/d.pdf", "b.txt", "e.py"]
    fill(tmp_path, *wanted, "photo.jpg", "Makefile", ".hidden.md", ".git/notes.txt", "b/__pycache__/x.py")
    assert find(tmp_path, Selection()).paths == sorted(wanted)


@pytest.mark.parametrize(
    ("include", "exclude", "found"),
    [
        (["*.md"], [], ["a.md", "api/b.md", "api/old/c.md"]),
        ([], ["old"], ["a.md", "a.txt", "api/b.md"]),
        (["api/"], ["api/old/*"], ["api/b.md"]),
        (["api/*/c.md"], [], ["api/old/c.md"]),
        (["nothing"], [], []),
    ],
)
def test_patterns_choose_paths_names_and_folders(
    tmp_path: Path, include: list[str], exclude: list[str], found: list[str]
) -> None:
    fill(tmp_path, "a.md", "a.txt", "api/b.md", "api/old/c.md")
    assert find(tmp_path, Selection(include, exclude)).paths == found


def test_links_to_files_are_read_and_links_that_lead_back_end_nothing(tmp_path: Path) -> None:
    fill(tmp_path, "a.md", "deep/b.md")
    (tmp_path / "deep/again").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "folder.md").symlink_to("deep", target_is_directory=True)
    (tmp_path / "link.md").symlink_to("a.md")
    (tmp_path / "self.md").symlink_to("self.md")
    (tmp_path / "gone.md").symlink_to("nowhere.md")
    os.mkfifo(tmp_path / "pipe.txt")
    found = find(tmp_path, Selection())
    assert found.paths == ["a.md", "deep/b.md", "link.md"]
    assert found.skipped.keys() == {"self.md", "gone.md"}
    assert not found.failed


def test_a_link_that_leads_out_of_the_folder_is_not_read(tmp_path: Path) -> None:
    fill(tmp_path, "secrets/key.md", "docs/a.md", "docs/deep/b.md")
    (tmp_path / "docs/key.md").symlink_to(tmp_path / "secrets/key.md")
    (tmp_path / "docs/deep/up.md").symlink_to("../../secrets/key.md")
    (tmp_path / "docs/deep/inside.md").symlink_to("../a.md")
    (tmp_path / "docs-too").symlink_to("docs", target_is_directory=True)
    for folder in ("docs", "docs-too"):
        found = find(tmp_path / folder, Selection())
        assert found.paths == ["a.md", "deep/b.md", "deep/inside.md"]
        assert found.skipped == dict.fromkeys(["key.md", "deep/up.md"], "it is a link that leads out of the folder")


def test_a_name_that_is_no_text_is_told_of(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")).write_text("text")
    found = find(tmp_path, Selection())
    assert (found.paths, list(found.skipped.values())) == ([], ["its name is not UTF-8"])


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "huge.txt").open("wb") as file:
        file.truncate(files.MAX_FILE_BYTES + 1)
    with pytest.raises(UnreadableFile, match="larger than 64 MiB"):
        read_bytes(tmp_path / "huge.txt")


# What they say.


@pytest.mark.parametrize(
    "data", ["é\n".encode(), b"\xef\xbb\xbf\xc3\xa9\r\n", "é\r".encode("utf-16"), "é\n".encode("utf-32")]
)
def test_text_is_read_with_or_without_a_mark(data: bytes) -> None:
    assert read("a.TXT", data) == ("é\n", "text")


@pytest.mark.parametrize(
    ("path", "data", "why"),
    [
        ("a.txt", b"caf\xe9", "not text in UTF-8"),
        ("a.md", b"a\0b", "zero bytes"),
        ("a.txt", b"", "holds no text"),
        ("a.html", b"<script>1</script> ", "holds no text"),
        ("a.html", b"<meta charset=no-such>x", "not text in NO-SUCH"),
        ("a.html", b"<meta charset=hex>x", "not text in HEX"),
        ("a.py", b"# coding: no-such\n", "encoding that it declares"),
        ("a.py", b"# coding: rot13\nx = 1\n", "not text in ROT13"),
        ("a.pdf", b"", "no PDF that can be read"),
        ("a.pdf", b"%PDF-1.4\njunk", "no PDF that can be read"),
        ("a.pdf", pdf("secret", password="x"), "it is encrypted"),
        ("a.pdf", pdf(""), "maybe pictures"),
    ],
)
def test_a_file_without_readable_text_says_why(path: str, data: bytes, why: str) -> None:
    with pytest.raises(UnreadableFile, match=why):
        read(path, data)


def test_programs_and_pages_are_read_in_the_encoding_they_declare() -> None:
    assert read("a.py", "# coding: latin-1\n# é".encode("latin-1"))[0].endswith("é")
    assert read("a.htm", '<meta charset="koi8-r"><p>слово'.encode("koi8-r")) == ("слово", "markdown")
    assert read("a.htm", '<?xml encoding="utf-16"?><p>é'.encode())[0] == "é"


@pytest.mark.parametrize("encoding", ["punycode", "IDNA", "-punycode-"])
def test_an_encoding_of_names_of_hosts_is_taken_for_none(encoding: str) -> None:
    # A few million letters in it would be read for hours.
    assert read("a.html", f"<meta charset={encoding}><p>é".encode())[0] == "é"
    assert read("a.py", f"# coding: {encoding}\n# é".encode())[0].endswith("é")


def test_a_page_becomes_markdown_without_what_it_does_not_show() -> None:
    page = """<!doctype html><html><head><title>The &amp; title</title><style>p {}</style></head><body>
      <script>if (a < b) {}</script><svg><title>No</title><text>no</text></svg>
      <h2>Set <i>up</i></h2><p>First
         line<br>second &eacute;</p><ul><li><p>one</p><li>two</ul>
      <table><tr><th>a<td>b<tr><td>c</table><pre># not a
  heading</pre><div>end"""
    assert read("a.html", page.encode())[0] == (
        "# The & title\n\n## Set up\n\nFirst line\n\nsecond é\n\n- one\n\n- two\n\na | b\n\nc\n\n"
        "```\n# not a\n  heading\n```\n\nend"
    )


@pytest.mark.parametrize("broken", ["x<a ", "x<", "x<!--", "<b>x", "<div><b>x", "<table><td>x", "<pre>x", "<svg>"])
def test_a_page_of_tags_left_open_is_read_in_no_time(broken: str) -> None:
    # With the parser of the standard library the first took a minute.
    assert read("a.html", b"<p>begun" + broken.encode() * 20_000)[0].startswith("begun")


def test_the_pages_of_a_pdf_are_kept_apart() -> None:
    text, written = read("a.pdf", pdf("First page.", "Second page."))
    assert (text, written) == ("First page.\n\f\nSecond page.", "text")
    document = Document(id="a", text=text)
    pages = [(each.text, each.metadata["page"]) for each in split(document, Split(size=16, overlap=0), "job")]
    assert pages == [("First page.", 1), ("Second page.", 2)]


def test_a_pdf_is_read_only_as_far_as_its_text_may_reach() -> None:
    data = pdf(*["A page of 20 letters"] * 10)
    assert read_pdf(data, 200).count("letters") == 10
    with pytest.raises(UnreadableFile, match="more than 199 characters"):
        read_pdf(data, 199)


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_end_a_run(data: bytes) -> None:
    for suffix in ("txt", "md", "html", "py", "pdf"):
        try:
            text, _ = read(f"a.{suffix}", data)
        except UnreadableFile:
            continue
        assert text.strip()
        assert "\r" not in text


# Passages.

SPLITS = st.builds(
    lambda size, share, unit, written: Split(size=size, overlap=int(size * share), unit=unit, format=written),
    st.integers(16, 80),
    st.floats(0, 0.5),
    st.sampled_from(["characters", "tokens"]),
    st.sampled_from(["text", "markdown", "python"]),
)
TEXTS = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=60),
        st.sampled_from(
            ["# One\n", "## Two\n\n", "def f(a):\n    return a\n", "```\ncode\n```\n", "- item\n", "\r\n", "\f", "🦛é"]
        ),
    ),
    min_size=1,
    max_size=12,
).map("".join)


def starts(passages: list[Document]) -> list[int]:
    return [int(passage.metadata["start"]) for passage in passages]


# The vocabulary is read with the first tokens.
@settings(deadline=None)
@given(TEXTS.filter(bool), SPLITS)
def test_passages_cover_the_text_are_no_longer_than_wanted_and_always_the_same(text: str, how: Split) -> None:
    document = Document(id="a", text=text, metadata={"year": 2020})
    passages = split(document, how, "job")
    assert passages == split(document, how, "job")
    assert [passage.id for passage in passages] == [f"a#passage-{number}" for number in range(len(passages))]
    covered = [False] * len(text)
    for place, passage in zip(starts(passages), passages, strict=True):
        assert text.startswith(passage.text, place)
        covered[place : place + len(passage.text)] = [True] * len(passage.text)
    assert not "".join(sign for sign, is_covered in zip(text, covered, strict=True) if not is_covered).strip()
    tokens = TextSplitter.from_tiktoken_model(TOKENIZER, how.size)
    for number, passage in enumerate(passages):
        if how.unit == "characters":
            assert len(passage.text) <= how.size
        else:
            assert len(tokens.chunks(passage.text)) == 1
        assert passage.metadata["year"] == 2020
        assert (passage.metadata["document"], passage.metadata["passage"]) == ("a", number)
        assert passage.metadata["passages"] == len(passages)
        assert document_of(passage.id, passage.metadata) == "a"


def test_tokens_are_counted_as_such() -> None:
    text = "Internationalization is a long word. " * 40
    by_characters = split(Document(text=text), Split(size=40, overlap=0), "job")
    by_tokens = split(Document(text=text), Split(size=40, overlap=0, unit="tokens"), "job")
    assert len(by_tokens) * 3 < len(by_characters)


def test_passages_overlap_as_much_as_wanted() -> None:
    text = " ".join(f"word{number}" for number in range(200))
    passages = split(Document(text=text), Split(size=100, overlap=30), "job")
    places = starts(passages)
    for place, following, passage in zip(places, places[1:], passages, strict=False):
        assert 0 < place + len(passage.text) - following <= 30
    apart = split(Document(text=text), Split(size=100, overlap=0), "job")
    assert " ".join(passage.text for passage in apart) == text


def test_a_blank_document_has_no_passage() -> None:
    assert split(Document(text=" \n"), Split(), "job") == []


@pytest.mark.parametrize("wrong", [{"size": 15}, {"size": 100, "overlap": 51}, {"unit": "words"}, {"sise": 100}])
def test_a_split_that_cannot_be_meant_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Split(**wrong)


# Headings.

GUIDE = """---
title: Guide
---
Before.

# Setup

How.

Linux
-----

```sh
# no heading
```

## Windows ##

### Old *Windows*
Text.

# Use
"""
PROGRAM = '''import os


@dec
class Cluster:
    """Of nodes, \\d."""

    async def join(self):
        def inner(): ...
        return 1

if os:
    def leave(): ...
x = 1
'''


@pytest.mark.parametrize(
    ("text", "written", "place", "heading"),
    [
        (GUIDE, "markdown", "Before", ""),
        (GUIDE, "markdown", "# Setup", "Setup"),
        (GUIDE, "markdown", "# no heading", "Setup > Linux"),
        (GUIDE, "markdown", "## Windows", "Setup > Windows"),
        (GUIDE, "markdown", "Text", "Setup > Windows > Old *Windows*"),
        (GUIDE, "markdown", "# Use", "Use"),
        (GUIDE.replace("\n", "\r\n"), "markdown", "# no heading", "Setup > Linux"),
        (GUIDE, "text", "Text", ""),
        (PROGRAM, "python", "import", ""),
        (PROGRAM, "python", "@dec", "Cluster"),
        (PROGRAM, "python", "async", "Cluster.join"),
        (PROGRAM, "python", "def inner", "Cluster.join.inner"),
        (PROGRAM, "python", "return", "Cluster.join"),
        (PROGRAM, "python", "if os", ""),
        (PROGRAM, "python", "def leave", "leave"),
        (PROGRAM, "python", "x = 1", ""),
        ("print 'two'\n", "python", "print", ""),
    ],
)
def test_the_heading_of_a_place_is_known(text: str, written: Format, place: str, heading: str) -> None:
    assert Headings(text, written).at(text.index(place)) == heading


def test_a_heading_has_an_end() -> None:
    assert len(Headings("# " + "a" * 10_000, "markdown").at(0)) == MAX_HEADING


def test_passages_know_their_headings() -> None:
    passages = split(Document(id="g", text=GUIDE), Split(size=40, overlap=0, format="markdown"), "job")
    assert passages[-1].metadata["heading"] == "Use"
    assert "heading" not in passages[0].metadata


# Whole documents.


def stored(*documents: Document) -> list[tuple[str, dict[str, Any]]]:
    return [(document.id, dict(document.metadata)) for document in documents]


def test_documents_are_put_together_from_their_passages() -> None:
    long = Document(id="long", text="word " * 50, metadata={"digest": "1"})
    passages = split(long, Split(size=50, overlap=0), "job")
    own = Document(id="mine#1", text="a", metadata={"document": "other", "passage": 1})
    held = [*stored(*reversed(passages)), *stored(own, Document(id="short", text="a"))]
    assert wholes(held, "", 10) == [
        Whole(id="long", metadata={"digest": "1"}, passages=len(passages), complete=True),
        Whole(id="mine#1", metadata={"document": "other", "passage": 1}, passages=1, complete=True),
        Whole(id="short", metadata={}, passages=1, complete=True),
    ]


def test_a_document_is_not_complete_without_a_passage_or_with_one_of_another_version() -> None:
    how = Split(size=50, overlap=0)
    passages = split(Document(id="a", text="word " * 50, metadata={"digest": "1"}), how, "job")
    changed = split(Document(id="a", text="word " * 50, metadata={"digest": "2"}), how, "job")
    longer = split(Document(id="a", text="word " * 70, metadata={"digest": "1"}), how, "job")
    other = split(Document(id="a", text="text " * 50, metadata={"digest": "1"}), how, "other job")
    mixed = ([*changed[:1], *passages[1:]], [*passages, *longer[len(passages) :]], [*other[:1], *passages[1:]])
    for held in (passages[1:], passages[:-1], *mixed):
        [whole] = wholes(stored(*held), "", 10)
        assert not whole.complete


@pytest.mark.parametrize(
    "metadata",
    [
        {"document": "d"},
        {"document": 5, "passage": 3},
        {"document": "d", "passage": "3"},
        {"document": "d", "passage": 3},
        {"document": "d", "passage": 3, "passages": "4"},
        {"document": "d", "passage": True, "passages": 4},
    ],
)
def test_what_only_looks_like_a_passage_is_a_document(metadata: dict[str, Any]) -> None:
    for stored_id in ("d#passage-None", "5#passage-3", "d#passage-3", "d#passage-True"):
        alone = Whole(id=stored_id, metadata=metadata, passages=1, complete=True)
        assert wholes([(stored_id, metadata)], "", 10) == [alone]


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcdefghij"), st.integers(0, 2))), st.integers(1, 4))
def test_pages_of_a_list_are_together_the_list(pieces: list[tuple[str, int]], limit: int) -> None:
    held = [
        (f"{name}#passage-{number}", {"document": name, "passage": number, "passages": 3})
        for name, number in dict.fromkeys(pieces)
    ]
    everything = wholes(held, "", 100)
    pages: list[Whole] = []
    while page := wholes(held, pages[-1].id if pages else "", limit):
        assert len(page) <= limit
        pages += page
    assert pages == everything
    assert [whole.id for whole in everything] == sorted({name for name, _ in pieces})
