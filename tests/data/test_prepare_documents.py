"""`data prepare documents`: what is read of each kind of file, and how it is cut into chunks."""

from __future__ import annotations

import io
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from core.errors import UserError
from data.prepare.common import Record, Sample, write_prepared
from data.prepare.documents import Documents, check_lengths, read_document
from data.prepare.documents_blocks import Block, UnreadableError, clean
from data.prepare.documents_chunks import join, make_chunks
from data.prepare.documents_pdf import paragraphs, without_running_heads
from data.prepare.documents_sentences import sentences


def count_words(texts: list[str]) -> list[int]:
    """Words and marks: as good as tokens where the numbers are to be checked by hand."""
    return [len(re.findall(r"\w+|[^\w\s]", text)) for text in texts]


def kind(max_tokens: int = 64, overlap: int = 0) -> Documents:
    return Documents(max_tokens, overlap, num_special=1, tokenizer="words", count_tokens=count_words)


def texts_of(name: str, content: str | bytes) -> list[str]:
    data = content.encode() if isinstance(content, str) else content
    return [block.text for block in read_document(name, data).blocks]


# --- sentences --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("It grew by 3.5 percent. Then it fell.", ["It grew by 3.5 percent.", "Then it fell."]),
        ("Use a tool, e.g. Python, for it. Good.", ["Use a tool, e.g. Python, for it.", "Good."]),
        ("Dr. J. Smith came. He left.", ["Dr. J. Smith came.", "He left."]),
        ("See Fig. 3 and Eq. (2). They agree.", ["See Fig. 3 and Eq. (2).", "They agree."]),
        ("He said “Go.” She went.", ["He said “Go.”", "She went."]),
        ("版本一已发布。请更新！好。", ["版本一已发布。", "请更新！", "好。"]),
        ("It costs... nothing. Really… Yes.", ["It costs... nothing.", "Really…", "Yes."]),
        ("2. Results of the U.S. Army.", ["2. Results of the U.S. Army."]),
        ("Das gilt z.B. Montags. Ende.", ["Das gilt z.B. Montags.", "Ende."]),
        ("no border here", ["no border here"]),
    ],
)
def test_sentences(text: str, expected: list[str]) -> None:
    found = list(sentences(text))
    assert [sentence for _, sentence in found] == expected
    assert "".join(gap + sentence for gap, sentence in found) == text


# --- chunks -----------------------------------------------------------------------------------------------------------


def blocks_of(*texts: str) -> list[Block]:
    return [Block(text) for text in texts]


def test_chunks_by_hand() -> None:
    """Four tokens a sentence, ten a chunk, four of them repeated."""
    blocks = blocks_of("Aa bb cc. Dd ee ff. Gg hh ii.", "Jj kk ll.")
    _, chunks = make_chunks(blocks, max_tokens=10, overlap=4, count_tokens=count_words)
    assert [chunk.text for chunk in chunks] == ["Aa bb cc. Dd ee ff.", "Dd ee ff. Gg hh ii.", "Gg hh ii.\n\nJj kk ll."]
    assert [chunk.num_repeated for chunk in chunks] == [0, 1, 1]
    assert [chunk.num_tokens for chunk in chunks] == [8, 8, 8]


def test_no_chunk_is_only_overlap() -> None:
    _, chunks = make_chunks(blocks_of("Aa bb cc. Dd ee ff."), max_tokens=10, overlap=5, count_tokens=count_words)
    assert [chunk.text for chunk in chunks] == ["Aa bb cc. Dd ee ff."]


def test_a_heading_goes_with_what_is_under_it() -> None:
    blocks = [Block("Aa bb cc dd ee ff."), Block("# Hh", "heading"), Block("Ii jj kk ll mm nn.")]
    _, chunks = make_chunks(blocks, max_tokens=10, overlap=0, count_tokens=count_words)
    assert [chunk.text for chunk in chunks] == ["Aa bb cc dd ee ff.", "# Hh\n\nIi jj kk ll mm nn."]


def test_a_small_last_chunk_goes_to_the_one_before_if_its_overlap_makes_room() -> None:
    first, second, third = "A " * 14 + "a.", "B " * 14 + "b.", "C."
    blocks = blocks_of(first, second, third)
    _, chunks = make_chunks(blocks, max_tokens=32, overlap=16, count_tokens=count_words)
    # 16 + 16 fill the first; the last sentence would come with a chunk of its own, of which 16 are repeated
    assert [chunk.text for chunk in chunks] == [f"{first}\n\n{second}", f"{second}\n\n{third}"]
    blocks = blocks_of(first, second, "D " * 13 + "d.", third)
    _, chunks = make_chunks(blocks, max_tokens=32, overlap=16, count_tokens=count_words)
    assert [chunk.text.split()[0] for chunk in chunks] == ["A", "D"]
    assert chunks[-1].text.endswith("C.")
    assert [chunk.num_repeated for chunk in chunks] == [0, 0]


def test_a_sentence_that_is_too_long_is_cut_at_words_and_a_word_at_characters() -> None:
    text = " ".join(f"w{number}" for number in range(100))
    pieces, chunks = make_chunks([Block(text)], max_tokens=16, overlap=0, count_tokens=count_words)
    assert join(pieces) == text
    assert all(chunk.num_tokens <= 16 for chunk in chunks)
    assert {word for chunk in chunks for word in chunk.text.split()} == set(text.split())

    def count_characters(texts: list[str]) -> list[int]:
        return [len(text) for text in texts]

    _, chunks = make_chunks([Block("x" * 50)], max_tokens=16, overlap=0, count_tokens=count_characters)
    assert "".join(chunk.text for chunk in chunks) == "x" * 50
    assert max(chunk.num_tokens for chunk in chunks) <= 16


def random_blocks(seed: int) -> list[Block]:
    draw = random.Random(seed)
    blocks = []
    for _ in range(draw.randint(1, 30)):
        kinds = draw.choice(["prose", "prose", "heading", "item", "lines"])
        sentence = [" ".join(["Word"] + ["w"] * draw.randint(0, 25)) + "." for _ in range(draw.randint(1, 8))]
        text = "# Head" if kinds == "heading" else ("\n" if kinds == "lines" else " ").join(sentence)
        blocks.append(Block(text, kinds))  # type: ignore[arg-type]
    return blocks


@pytest.mark.parametrize("seed", range(25))
def test_chunks_cover_every_piece_once_apart_from_the_overlap_and_are_never_too_long(seed: int) -> None:
    blocks = random_blocks(seed)
    max_tokens, overlap = [(20, 0), (40, 10), (64, 32), (17, 8)][seed % 4]
    pieces, chunks = make_chunks(blocks, max_tokens=max_tokens, overlap=overlap, count_tokens=count_words)
    covered = 0
    for chunk in chunks:
        assert chunk.start + chunk.num_repeated == covered
        assert chunk.stop > covered, "a chunk without anything new"
        assert chunk.text == join(pieces[chunk.start : chunk.stop])
        assert chunk.num_tokens == count_words([chunk.text])[0] <= max_tokens
        assert count_words([join(pieces[chunk.start : covered])])[0] <= overlap
        covered = chunk.stop
    assert covered == len(pieces)
    # nothing of the text is lost on the way to pieces
    assert join(pieces).split() == " ".join(block.text for block in blocks).split()


# --- what is read of each kind ----------------------------------------------------------------------------------------


def test_markdown() -> None:
    text = """---
title: "The Guide"
layout: page
---
# Guide <!-- hidden -->

A [link](https://example.org/x) and ![badge](b.png) *here*,
with `code`.

<!-- a comment -->
1. first
   - inner

     more
2. second

```python
x = 1  # kept

y = 2
```

| a | b |
|---|---|
| 1 | 2 |

[ref]: https://example.org
"""
    document = read_document("a.md", text.encode())
    assert document.title == "The Guide"
    assert [block.text for block in document.blocks] == [
        "# Guide",
        "A link and here, with `code`.",
        "1. first",
        "  - inner",
        "    more",
        "2. second",
        "```python\nx = 1  # kept\n\ny = 2\n```",
        "a | b\n1 | 2",
    ]


def test_html() -> None:
    text = """<!DOCTYPE html><html><head><title>My page</title><style>p {}</style></head><body>
<header>Site name</header><nav><a href="/">Home</a></nav>
<main><header><h1>Top<a class="headerlink" href="#t">¶</a></h1></header>
<p>Some <b>bold</b> text with <code>f(x)</code>.<br>Next line.</p><script>alert(1)</script><!-- no -->
<ul><li>one<ul><li>inner</li></ul></li><li>two</li></ul>
<table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>2</td></tr></table>
<div><pre>
if x:
    y &lt; 1
</pre></div><p hidden>secret</p>
<aside>advert</aside><p><a href="b" rel="next">Next: B</a></p></main>
<footer>Imprint</footer></body></html>"""
    document = read_document("a.html", text.encode())
    assert document.title == "My page"
    assert [block.text for block in document.blocks] == [
        "# Top",
        "Some bold text with `f(x)`.\nNext line.",
        "- one",
        "  - inner",
        "- two",
        "a | b\n1 | 2",
        "```\nif x:\n    y < 1\n```",
    ]


def test_html_without_a_main_part_and_with_a_table_for_layout() -> None:
    text = "<body><table><tr><td><h2>A</h2>text</td></tr></table>loose<p>more</body>"
    assert texts_of("a.htm", text) == ["## A", "text", "loose", "more"]


def test_latex() -> None:
    text = r"""\documentclass{article} % not this
\newcommand{\tool}{\textsc{Toolkit}}
\newcommand{\pair}[2]{#1 and #2}
\title{On \emph{things}}
\begin{document}\maketitle
\begin{abstract}We use \tool\ on \pair{cats}{dogs}.\end{abstract}
\section{Intro}\label{sec:i}
First \textbf{bold} and $x_1 \in \mathbb{R}$, 50\% of it~\cite{a}. % comment

Second --- na\"ive.\footnote{A note.}
\begin{itemize}\item one \item two\end{itemize}
\begin{equation}\label{e} E = mc^2 \end{equation}
\begin{lstlisting}[language=C]
  int x; // 100% kept
\end{lstlisting}
\begin{tabular}{ll} a & b \\ \hline 1 & 2 \end{tabular}
\unknown{left}{right}
\begin{figure}\includegraphics{x.png}\caption{A plot.}\end{figure}
\begin{thebibliography}{9}\bibitem{a} Somebody.\end{thebibliography}
\end{document}"""
    document = read_document("a.tex", text.encode())
    assert document.title == "On things"
    assert [block.text for block in document.blocks] == [
        "# Abstract",
        "We use Toolkit on cats and dogs.",
        "# Intro",
        r"First bold and $x_1 \in \mathbb{R}$, 50% of it.",
        "Second — naïve. (A note.)",
        "- one",
        "- two",
        r"\begin{equation}E = mc^2 \end{equation}",
        "```\nint x; // 100% kept\n```",
        "a | b\n1 | 2",
        "left right",
        "A plot.",
    ]


def test_plain_text() -> None:
    text = """The Title
=========

A paragraph that somebody has broken by hand at
the right margin, over two lines.

 * one item that goes
   on
 * another

    name      value
    x         1

Roses are red,
violets are blue.
"""
    document = read_document("a.txt", text.encode())
    assert document.title == "The Title"
    assert [block.text for block in document.blocks] == [
        "# The Title",
        "A paragraph that somebody has broken by hand at the right margin, over two lines.",
        "- one item that goes on",
        "- another",
        "name      value\nx         1",
        "Roses are red,\nviolets are blue.",
    ]


def test_characters_are_cleaned() -> None:
    assert clean("e\u0301 ﬁn\u00ad\u200b x² ½\x07\u00a0y") == "é fin x² ½ y"
    assert texts_of("a.txt", "\ufeffone\r\n\r\ntwo\rthree and more words so that this line is long enough") == [
        "one",
        "two\nthree and more words so that this line is long enough",
    ]
    assert texts_of(
        "a.txt", "长长的文字在这里被手工换行所以这一行要足够长才能算作一个完整的段落文字在这里被手工\n继续。"
    ) == ["长长的文字在这里被手工换行所以这一行要足够长才能算作一个完整的段落文字在这里被手工继续。"]


# --- PDF --------------------------------------------------------------------------------------------------------------


def make_pdf(pages: Sequence[Sequence[str]], *, title: str = "") -> bytes:
    """A PDF with one line of Helvetica below the other."""
    objects = [b"<< /Type /Catalog /Pages 2 0 R >>", b""]
    kids = []
    for lines in pages:
        drawn = " ".join(f"({line}) Tj 0 -14 Td" for line in lines)
        stream = f"BT /F1 11 Tf 50 750 Td {drawn} ET".encode("latin-1")
        objects.append(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream))
        font = "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"
        page = f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 595 842] /Contents {len(objects)} 0 R"
        objects.append(f"{page} /Resources << /Font << /F1 {font} >> >> >>".encode())
        kids.append(f"{len(objects)} 0 R")
    objects[1] = f"<< /Type /Pages /Kids [{' '.join(kids)}] /Count {len(kids)} >>".encode()
    objects.append(f"<< /Title ({title}) >>".encode())
    out = io.BytesIO()
    out.write(b"%PDF-1.4\n")
    places = []
    for number, content in enumerate(objects, start=1):
        places.append(out.tell())
        out.write(b"%d 0 obj\n%s\nendobj\n" % (number, content))
    start = out.tell()
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    out.write(f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}".encode())
    trailer = (
        f"trailer\n<< /Size {len(objects) + 1} /Root 1 0 R /Info {len(objects)} 0 R >>\nstartxref\n{start}\n%%EOF\n"
    )
    out.write(trailer.encode())
    return out.getvalue()


PAGES = [
    ["A Paper on Things", "The first line of a paragraph that is as wide as the others of this docu-",
     "ment, which is a well-known way to write. It goes on and on until the page is", "1"],
    ["A Paper on Things", "full, and then it ends here.",
     "Another paragraph of the text, which is again as wide as the lines above, well-",
     "known as it is.", "2"],
    ["A Paper on Things", "The last page has one long line that is all there is to read on it, and no more.", "3"],
]  # fmt: skip
PARAGRAPHS = [
    "The first line of a paragraph that is as wide as the others of this document, which is a well-known way to write. "
    "It goes on and on until the page is full, and then it ends here.",
    "Another paragraph of the text, which is again as wide as the lines above, well-known as it is.",
    "The last page has one long line that is all there is to read on it, and no more.",
]


def test_pdf() -> None:
    document = read_document("a.pdf", make_pdf(PAGES, title="A Paper on Things"))
    assert document.title == "A Paper on Things"
    assert [block.text for block in document.blocks] == PARAGRAPHS


def test_running_heads_and_page_numbers_go_and_the_first_of_a_kind_stays() -> None:
    pages = [["4 Chapter One", f"Words of page {word}", f"{word} x", "- 7 -"] for word in ("a", "b", "c")]
    pages.append(["Only here", "Words of page d", "d x", "iv"])
    assert without_running_heads(pages) == [
        ["Words of page a", "a x"],
        ["Words of page b", "b x"],
        ["Words of page c", "c x"],
        ["Only here", "Words of page d", "d x"],
    ]
    assert without_running_heads([["12", "text"]]) == [["12", "text"]], "one page: it may be its content"


def test_bullets_and_dots_of_a_table_of_contents() -> None:
    page = ["1 Introduction . . . . . . . . . . . . . 3", "• first thing", "• second", "thing"]
    found = paragraphs([page])
    assert [(block.text, block.kind) for block in found] == [("- first thing", "item"), ("- second thing", "item")]


# --- what is left out -------------------------------------------------------------------------------------------------


def encrypted_pdf() -> bytes:
    from pypdf import PdfReader, PdfWriter

    writer = PdfWriter(clone_from=PdfReader(io.BytesIO(make_pdf(PAGES))))
    writer.encrypt(user_password="secret", algorithm="RC4-128")
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.txt", "Text".encode("utf-16"), "files in UTF-16, not UTF-8"),
        ("a.txt", b"caf\xe9", "files that are not UTF-8"),
        ("a.md", b"PK\x00\x01", "binary files"),
        ("a.html", b"<div>" * 5000 + b"deep", "files that are nested too deeply"),
        ("a.pdf", make_pdf([[], []]), "PDF files without text (scanned?)"),
        ("a.pdf", make_pdf(PAGES)[:300], "damaged PDF files"),
        ("a.pdf", make_pdf([["/g1 /g2 /g3 /g4"]]), "PDF files whose fonts don't say which characters they show"),
    ],
)  # fmt: skip
def test_files_that_can_not_be_read_say_why(name: str, content: bytes, reason: str) -> None:
    with pytest.raises(UnreadableError) as caught:
        read_document(name, content)
    assert str(caught.value) == reason


def test_an_encrypted_pdf() -> None:
    with pytest.raises(UnreadableError, match="encrypted"):
        read_document("a.pdf", encrypted_pdf())


def test_a_folder_counts_what_it_leaves_out(tmp_path: Path) -> None:
    for name, content in {
        "b.txt": "Some text. More of it.",
        "a/c.md": "# Other\n\nText here.",
        "copy.txt": "Some text.  More of it.",
        "empty.txt": " \n---\n",
        "image.png": "x",
        "CMakeLists.txt": "project(x)",
        "numbers.txt": "0.25 1.5e3 17.0\n" * 9,
        "README": "Read me first.",
        "node_modules/x.md": "dependency",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / "bad.txt").write_bytes(b"\xff\x00")
    record = Record()
    rows = list(kind().samples(tmp_path, record))
    assert rows == [
        Sample({"text": "Read me first.", "chunk": 1, "title": "README"}, "README"),
        Sample({"text": "# Other\n\nText here.", "chunk": 1, "title": "Other"}, "a/c.md"),
        Sample({"text": "Some text. More of it.", "chunk": 1, "title": "b"}, "b.txt"),
    ]
    assert {reason: entry["named"] for reason, entry in record.left_out.to_json().items()} == {
        "binary files": ["bad.txt"],
        "documents with the text of another": ["copy.txt"],
        "documents without text": ["empty.txt"],
        "documents of numbers rather than words": ["numbers.txt"],
        "files that are no documents": ["CMakeLists.txt", "image.png"],
        "folders of dependencies": ["node_modules/"],
    }


def test_the_same_bytes_each_time_and_wherever_the_folder_lies(tmp_path: Path) -> None:
    for place in ("one", "two"):
        folder = tmp_path / place / "docs"
        folder.mkdir(parents=True)
        for number in range(5):
            (folder / f"{number}.txt").write_text(f"Text {number}. " * 50)
        record = Record()
        made = kind(32, 8)
        write_prepared(made.samples(folder, record), tmp_path / place / "out", kind=made, record=record)
    names = ("rows.jsonl", "manifest.json")
    first, second = ([(tmp_path / place / "out" / name).read_bytes() for name in names] for place in ("one", "two"))
    assert first == second
    rows = [json.loads(line) for line in first[0].splitlines()]
    assert all(count_words([row["text"]])[0] <= 31 for row in rows), "a special token is left room for"
    assert [row["chunk"] for row in rows if row["source"] == "3.txt"] == list(range(1, len(rows) // 5 + 1))


def test_mistakes_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "a.docx").write_bytes(b"x")
    with pytest.raises(UserError, match=r"\.docx is no kind of document"):
        list(kind().samples(tmp_path / "a.docx", Record()))
    with pytest.raises(UserError, match="no such file"):
        list(kind().samples(tmp_path / "none", Record()))
    with pytest.raises(UserError, match="--overlap 40 is more than half of --tokens 64"):
        check_lengths(kind(64, 40))
    with pytest.raises(UserError, match="--tokens 16 is too few"):
        check_lengths(kind(16))
