"""LaTeX -> blocks: what a reader of the printed page reads; maths as it is written."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data.prepare.documents_blocks import (
    Block,
    Document,
    UnreadableError,
    clean,
    code,
    heading,
    one_line,
    prose,
    table,
    words,
)

_SECTIONS = {
    **{"part": 1, "chapter": 1, "section": 1, "subsection": 2, "subsubsection": 3},
    **{"paragraph": 4, "subparagraph": 5},
}
_DROPPED_MACROS = words(
    """
    documentclass usepackage RequirePackage input include includegraphics bibliography bibliographystyle label ref eqref
    autoref cref Cref pageref nameref cite citet citep citealp citealt citeauthor citeyear parencite textcite nocite
    vspace hspace vskip hskip maketitle tableofcontents listoffigures listoftables newpage clearpage pagebreak
    setlength setcounter addtocounter pagestyle thispagestyle newcommand renewcommand providecommand newenvironment
    renewenvironment DeclareMathOperator newtheorem theoremstyle author date thanks index addcontentsline markboth
    hypersetup title color definecolor printbibliography cline cmidrule addtolength
    """
)
_DROPPED_ENVIRONMENTS = words("thebibliography tikzpicture pspicture picture comment filecontents")
_CODE = "verbatim lstlisting minted Verbatim alltt"
_MATHS = words("equation align gather multline eqnarray displaymath math flalign alignat dmath array split aligned")
_TABLES = words("tabular tabularx longtable tabulary")
_LISTS = {"itemize": None, "enumerate": 1, "description": None}
_NAMED = words("theorem lemma proposition corollary definition remark example proof conjecture claim assumption")
_MACRO_ARGUMENTS = {
    **{"href": "{{", "textcolor": "[{{", "caption": "*[{", "footnotetext": "[{", "paragraph": "*[{"},
    **{"subparagraph": "*[{", "citealp": "*[[{", "citealt": "*[[{", "parencite": "*[[{", "textcite": "*[[{"},
    **{"nameref": "{", "cref": "{", "Cref": "{", "newtheorem": "*{[{[", "theoremstyle": "{", "bibliography": "{"},
    **{"bibliographystyle": "{", "definecolor": "{{{", "hypersetup": "{", "index": "{", "thanks": "{", "color": "[{"},
    **{"setlength": "{{", "addtolength": "{{", "setcounter": "{{", "addtocounter": "{{", "pagestyle": "{"},
    **{"thispagestyle": "{", "addcontentsline": "{{{", "markboth": "{{", "nocite": "{", "cline": "{"},
    **{"cmidrule": "[{", "multicolumn": "{{{", "multirow": "{[{{", "resizebox": "*{{{", "scalebox": "{{"},
    **{"lstinline": "[{", "newenvironment": "*{[[{{", "renewenvironment": "*{[[{{"},
}
_ENVIRONMENT_ARGUMENTS = {
    **{"minipage": "[[[{", "multicols": "{", "tabulary": "{{", "longtable": "[{", "wrapfigure": "[{{"},
    **{"subfigure": "[{", "subtable": "[{", "adjustbox": "{", "columns": "[", "column": "[{", "frame": "[{"},
}
_LAST_ONLY = words("href textcolor multicolumn multirow resizebox scalebox")
"""Of whose arguments only the last is text."""
_SYMBOLS = {"LaTeX": "LaTeX", "TeX": "TeX", "LaTeXe": "LaTeX2e", "BibTeX": "BibTeX", "S": "§", "P": "¶"}
_BLANK_LINE = re.compile(r"\n[ \t]*\n\s*")
_LABEL = re.compile(r"\\label\s*\{[^}]*\}[ \t]*")
_CODE_ENVIRONMENT = re.compile(
    rf"\\begin\{{({'|'.join(sorted(words(_CODE)))})(\*?)\}}(?:\[[^\]]*\])?(?:\{{\w+\}})?(.*?)\\end\{{\1\2\}}", re.DOTALL
)
_SPACE_BEFORE_MARK = re.compile(r"\s+([.,;:)\]])")
_EMPTY_BRACKETS = re.compile(r"\s*(?:\(\s*[,;]*\s*\)|\[\s*[,;]*\s*\])")
_MOST_DEEP = 8
"""Macros that use macros."""


@dataclass(frozen=True, slots=True)
class _Macro:
    """What the file defines with `\\newcommand`."""

    num_arguments: int
    body: str


def read_latex(text: str) -> Document:
    """Headings, paragraphs, items, tables, code and formulas of the document's body, without comments and preamble.

    Macros that the file defines without optional arguments are written out, formulas apart. Of citations and references
    nothing is left.

    Raises:
        UnreadableError: not to be parsed.
        RecursionError: groups are nested hundreds deep.
    """
    text = _CODE_ENVIRONMENT.sub(lambda found: rf"\begin{{verbatim}}{found[3]}\end{{verbatim}}", text)
    nodes = _parse(text, {})
    macros = dict(_definitions(nodes))
    document = next((node for node in nodes if _name(node) == "document"), None)
    body = nodes if document is None else document.nodelist
    if macros and document is not None:
        source = "".join(node.latex_verbatim() for node in document.nodelist)
        body = _parse(source, macros)
    reader = _Reader(macros)
    reader.read(body)
    reader.flush()
    return Document(_title([*nodes, *body], macros) or reader.title, tuple(reader.blocks))


def _parse(text: str, macros: Mapping[str, _Macro]) -> Sequence[Any]:
    from pylatexenc.latexwalker import LatexWalker, LatexWalkerError, get_default_latex_context_db
    from pylatexenc.macrospec import EnvironmentSpec, MacroSpec

    arguments = _MACRO_ARGUMENTS | {name: "{" * macro.num_arguments for name, macro in macros.items()}
    context = get_default_latex_context_db()
    context.add_context_category(
        "twinkeel",
        macros=[MacroSpec(name, wanted) for name, wanted in arguments.items()],
        environments=[EnvironmentSpec(name, wanted) for name, wanted in _ENVIRONMENT_ARGUMENTS.items()],
        prepend=True,
    )
    try:
        nodes, _, _ = LatexWalker(text, latex_context=context, tolerant_parsing=True).get_latex_nodes()
    except LatexWalkerError:
        raise UnreadableError("LaTeX files that can't be parsed") from None
    found: Sequence[Any] = nodes
    return found


def _name(node: Any) -> str:
    """Of an environment, else empty."""
    name: str = getattr(node, "environmentname", "")
    return name.removesuffix("*")


def _definitions(nodes: Sequence[Any]) -> Iterator[tuple[str, _Macro]]:
    for node in nodes:
        if getattr(node, "macroname", "") not in ("newcommand", "renewcommand", "providecommand"):
            continue
        _, named, number, default, body = node.nodeargd.argnlist
        name = _inner(named).strip().removeprefix("\\")
        count = _inner(number).strip() or "0"
        if default is None and name.isalpha() and count.isdecimal() and body is not None:
            yield name, _Macro(int(count), _inner(body))


def _inner(node: Any) -> str:
    """The source of an argument, without its braces."""
    if node is None:
        return ""
    if hasattr(node, "delimiters"):
        return "".join(inner.latex_verbatim() for inner in node.nodelist)
    text: str = node.latex_verbatim()
    return text


def _title(nodes: Sequence[Any], macros: Mapping[str, _Macro]) -> str:
    for node in nodes:
        if getattr(node, "macroname", "") == "title":
            return one_line(_Reader(macros).text_of(node.nodeargd.argnlist[-1]))
    return ""


class _Reader:
    """Collects text until a paragraph ends."""

    def __init__(self, macros: Mapping[str, _Macro], *, depth: int = 0) -> None:
        from pylatexenc.latex2text import LatexNodes2Text

        self.title = ""
        self.blocks: list[Block] = []
        self._macros = macros
        self._depth = depth
        self._symbols = LatexNodes2Text()
        self._text: list[str] = []
        self._lists: list[int | None] = []
        self._marker: str | None = None
        self._skips_group = False

    def text_of(self, node: Any) -> str:
        """An argument as one paragraph."""
        if node is None:
            return ""
        inner = _Reader(self._macros, depth=self._depth)
        inner.read(node.nodelist if hasattr(node, "delimiters") else [node])
        inner.flush()
        return " ".join(block.text for block in inner.blocks)

    def read(self, nodes: Sequence[Any]) -> None:
        for before, node in zip([None, *nodes], nodes, strict=False):
            if self._skips_group:  # \\def\\name#1{body}
                self._skips_group = type(node).__name__ != "LatexGroupNode"
                continue
            match type(node).__name__:
                case "LatexCharsNode":
                    self._chars(node.chars)
                case "LatexGroupNode":
                    if type(before).__name__ == "LatexGroupNode":  # arguments of a macro that nobody knows
                        self._text.append(" ")
                    self.read(node.nodelist)
                case "LatexSpecialsNode":
                    self._text.append(self._symbols.node_to_text(node))
                case "LatexMathNode":
                    self._maths(node, is_display=node.displaytype == "display")
                case "LatexMacroNode":
                    self._macro(node)
                case "LatexEnvironmentNode":
                    self._environment(node)

    def _chars(self, text: str) -> None:
        first, *others = _BLANK_LINE.split(text)
        self._text.append(first)
        for other in others:
            self.flush()
            self._text.append(other)

    def _maths(self, node: Any, *, is_display: bool) -> None:
        source = _LABEL.sub("", node.latex_verbatim())
        if is_display:
            self.flush()
            lines = [line.strip() for line in clean(source).split("\n")]
            self.blocks.append(Block("\n".join(line for line in lines if line), "lines"))
        else:
            self._text.append(source)

    def _macro(self, node: Any) -> None:
        name = node.macroname
        arguments = list(node.nodeargd.argnlist or ()) if node.nodeargd is not None else []
        if name in _SECTIONS:
            self.flush()
            title = self.text_of(arguments[-1]) if arguments else ""
            self.title = self.title or title
            self.blocks += heading(title, _SECTIONS[name])
        elif name == "item":
            self._item(self.text_of(arguments[0]) if arguments else "")
        elif name == "par":
            self.flush()
        elif name in ("def", "gdef", "edef"):
            self._skips_group = True
        elif name in ("\\", "newline", "tabularnewline", "quad", "qquad", " "):
            self._text.append(" ")
        elif name == "verb":
            self._text.append(f"`{node.nodeargd.verbatim_text}`")
        elif name in ("texttt", "lstinline"):
            self._text.append(f"`{self.text_of(arguments[-1])}`")
        elif name in ("footnote", "footnotetext"):
            self._text.append(f" ({self.text_of(arguments[-1])})")
        elif name == "caption":
            self.flush()
            self._text.append(self.text_of(arguments[-1]))
            self.flush()
        elif name in self._macros:
            self._expand(self._macros[name], arguments)
        elif name not in _DROPPED_MACROS:
            self._other(node, arguments)

    def _other(self, node: Any, arguments: Sequence[Any]) -> None:
        """An accent, a symbol, or a macro whose arguments are text."""
        given = [argument for argument in arguments if argument is not None]
        if node.macroname in _SYMBOLS:
            self._text.append(_SYMBOLS[node.macroname] + node.macro_post_space)
            return
        if not given or len(node.macroname) == 1:
            self._text.append(self._symbols.node_to_text(node) + node.macro_post_space)
            return
        wanted = node.nodeargd.argspec or ""
        texts = [argument for argument, kind in zip(arguments, wanted, strict=False) if argument and kind == "{"]
        for argument in texts[-1:] if node.macroname in _LAST_ONLY else texts:
            self.read(argument.nodelist if hasattr(argument, "delimiters") else [argument])

    def _expand(self, macro: _Macro, arguments: Sequence[Any]) -> None:
        if self._depth >= _MOST_DEEP or len(arguments) != macro.num_arguments:
            return
        source = re.sub(r"#(\d)", lambda found: _argument(arguments, int(found[1])), macro.body)
        self._depth += 1
        self.read(_parse(source, self._macros))
        self._depth -= 1

    def _item(self, label: str) -> None:
        self.flush()
        if not self._lists:
            return
        number = self._lists[-1]
        indent = "  " * (len(self._lists) - 1)
        self._marker = f"{indent}- " if number is None else f"{indent}{number}. "
        self._lists[-1] = None if number is None else number + 1
        if label:
            self._text.append(f"{label}: ")

    def _environment(self, node: Any) -> None:
        name = _name(node)
        if name in _DROPPED_ENVIRONMENTS:
            return
        if name in _MATHS:
            self._maths(node, is_display=name != "math")
            return
        self.flush()
        if name == "verbatim":
            self.blocks += code(node.nodeargd.verbatim_text)
        elif name in _TABLES:
            self.blocks += table(self._rows(node.nodelist))
        elif name in _LISTS:
            self._lists.append(_LISTS[name])
            self.read(node.nodelist)
            self.flush()
            self._lists.pop()
            self._marker = None
        else:
            if name == "abstract":
                self.blocks += heading("Abstract", 1)
            elif name in _NAMED:
                self._text.append(f"{name.capitalize()}. ")
            self.read(node.nodelist)
            self.flush()

    def _rows(self, nodes: Sequence[Any]) -> Iterator[list[str]]:
        row: list[list[Any]] = [[]]
        for node in nodes:
            if getattr(node, "specials_chars", "") == "&":
                row.append([])
            elif getattr(node, "macroname", "") in ("\\", "tabularnewline"):
                yield [self._cell(cell) for cell in row]
                row = [[]]
            else:
                row[-1].append(node)
        yield [self._cell(cell) for cell in row]

    def _cell(self, nodes: Sequence[Any]) -> str:
        inner = _Reader(self._macros, depth=self._depth)
        inner.read(nodes)
        inner.flush()
        return " ".join(block.text for block in inner.blocks)

    def flush(self) -> None:
        """Ends the paragraph that is being collected."""
        text = _SPACE_BEFORE_MARK.sub(r"\1", _EMPTY_BRACKETS.sub("", "".join(self._text)))
        self._text.clear()
        for block in prose(text):
            if not self._lists:
                self.blocks.append(block)
                continue
            marker = "  " * len(self._lists) if self._marker is None else self._marker
            self._marker = None
            self.blocks.append(Block(marker + block.text, "item"))


def _argument(arguments: Sequence[Any], number: int) -> str:
    return _inner(arguments[number - 1]) if 0 < number <= len(arguments) else ""
