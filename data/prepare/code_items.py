"""The items of a file: functions, methods, implementations and types, with what belongs to them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from data.prepare.code_files import last_row, line_start
from data.prepare.code_languages import Language

if TYPE_CHECKING:
    from tree_sitter import Node

_FUNCTION_VALUES = frozenset({"arrow_function", "function_expression", "generator_function"})
_OPENERS = ("{", "(")
_MAX_DEPTH = 100
"""Of modules, conditions and types in each other; nobody writes so many."""


@dataclass(frozen=True, slots=True)
class Item:
    """A piece of a file. Places are bytes [start, end) of the cleaned source."""

    kind: str
    """In words: `function`, `method`, `struct`."""
    name: str
    """With the type that a method is of."""
    row: int
    """Of the item itself, from 0; its comments stand above."""
    start: int
    """Of its comments and attributes, from the beginning of the line."""
    head: int
    """Of its attributes and signature, behind the comments, from the beginning of the line."""
    split: int
    """Behind the signature and what opens the body; in Python behind the docstring, too."""
    end: int
    signature: str
    """Without comments, attributes and what opens the body."""
    doc: str
    """The text of the comment that describes it; empty if there is none."""
    docs: tuple[tuple[int, int], ...]
    """Comments behind `head` and the docstring, as whole lines: what an answer to the description leaves out."""
    around: tuple[str, ...]
    """How the types that it stands in begin (`impl Display for P {`), outermost first, each with its indentation."""
    has_error: bool
    node: Node


@dataclass(frozen=True, slots=True)
class _Scope:
    """What an item stands in."""

    names: tuple[str, ...] = ()
    around: tuple[str, ...] = ()
    is_type: bool = False
    depth: int = 0


class ItemReader:
    """Finds the items of one file."""

    def __init__(self, source: bytes, language: Language) -> None:
        self._source = source
        self._language = language

    def items(self, root: Node) -> Iterator[Item]:
        """In their order; a type comes before its methods."""
        yield from self._inside(root, _Scope())

    def _text(self, node: Node) -> str:
        return self._source[node.start_byte : node.end_byte].decode()

    def _inside(self, parent: Node, scope: _Scope) -> Iterator[Item]:
        children = parent.children if scope.depth < _MAX_DEPTH else []
        for index, child in enumerate(children):
            node = self._unwrapped(child)
            if self._is_item(node) and (body := self._body(node)) is not None:
                item = self._item(children, index, node, body, scope)
                yield item
                if node.type in self._language.types:
                    around = (*scope.around, self._header(child, node, body))
                    inner = _Scope((*scope.names, self._type_name(node)), around, True, scope.depth + 1)
                    yield from self._inside(body, inner)
            elif node.type in self._language.scopes:
                yield from self._inside(node, replace(scope, depth=scope.depth + 1))

    def _unwrapped(self, node: Node) -> Node:
        """The declaration in an `export`, a decorated definition or a template."""
        while node.type in self._language.wrappers:
            inner = (child for child in node.named_children if child.type in self._language.items)
            wrapped = (child for child in node.named_children if child.type in self._language.wrappers)
            found = next(inner, None) or next(wrapped, None)
            if found is None:
                return node
            node = found
        return node

    def _is_item(self, node: Node) -> bool:
        return node.is_named and node.type in self._language.items

    def _body(self, node: Node) -> Node | None:
        """What an item's braces hold; None for a declaration without them."""
        body = node.child_by_field_name("body")
        if body is not None:
            return body
        match node.type:
            case "lexical_declaration" | "variable_declaration" | "expression_statement":
                return _function_value(node)
            case "type_definition":  # typedef struct { … } name;
                inner = node.child_by_field_name("type")
                return None if inner is None else inner.child_by_field_name("body")
            case "type_alias_declaration":
                value = node.child_by_field_name("value")
                return value if value is not None and value.type == "object_type" else None
            case "type_declaration":
                return _go_body(node)
            case "macro_definition":
                return node
        return None

    def _item(self, siblings: Sequence[Node], index: int, node: Node, body: Node, scope: _Scope) -> Item:
        outer = siblings[index]
        leads = self._leads(siblings, index)
        head = next((lead for lead in leads if lead.type not in self._language.comments), outer)
        first = leads[0] if leads else outer
        split, doc = self._split(node, body), self._comment_doc(leads)
        docs = [self._lines(lead.start_byte, lead.end_byte) for lead in leads if lead.type in self._language.comments]
        if self._language.name == "python" and (found := self._docstring(body)) is not None:
            place, doc = found
            docs, split = [*docs, self._lines(*place)], place[1]
        end = outer.end_byte
        if index + 1 < len(siblings) and siblings[index + 1].type == ";" and siblings[index + 1].start_byte == end:
            end += 1
        kind = self._kind(node, scope)
        return Item(
            kind=kind,
            name=self._name(node, scope),
            row=node.start_point.row,
            start=line_start(self._source, first.start_byte),
            head=line_start(self._source, head.start_byte),
            split=split,
            end=end,
            signature=unindented(self._header(outer, node, body).removesuffix("{").rstrip()),
            doc=doc,
            docs=tuple(span for span in docs if span[0] >= head.start_byte),
            around=scope.around,
            has_error=outer.has_error,
            node=outer,
        )

    def _leads(self, siblings: Sequence[Node], index: int) -> list[Node]:
        """Comments and attributes right above an item, without a blank line between."""
        leads: list[Node] = []
        row = siblings[index].start_point.row
        for node in reversed(siblings[:index]):
            is_comment = node.type in self._language.comments
            if not (is_comment or node.type in self._language.attributes) or last_row(node) < row - 1:
                break
            if is_comment and (self._shares_line(node) or self._text(node).startswith(("#!", "//!", "/*!"))):
                break
            leads.insert(0, node)
            row = node.start_point.row
        return leads

    def _shares_line(self, node: Node) -> bool:
        """A comment behind code belongs to that."""
        begin = self._source.rfind(b"\n", 0, node.start_byte) + 1
        return bool(self._source[begin : node.start_byte].strip())

    def _comment_doc(self, leads: Sequence[Node]) -> str:
        """The nearest comments that describe, as text."""
        pattern = self._language.doc
        if pattern is None:
            return ""
        texts = [self._text(node) for node in leads if node.type in self._language.comments]
        docs = [text for text in texts if pattern.fullmatch(text.rstrip("\n"))]
        if docs and docs[-1].startswith("/*"):
            docs = docs[-1:]
        return comment_text(docs)

    def _split(self, node: Node, body: Node) -> int:
        """Behind what opens the body, if white space follows; else where the white space before it begins."""
        opener = body.start_byte
        if self._language.name == "python":
            before = body.prev_sibling
            while before is not None and before.type != ":":
                before = before.prev_sibling
            opener = body.start_byte - 1 if before is None else before.start_byte
        elif (found := next((child for child in body.children if child.type in _OPENERS), None)) is not None:
            opener = found.start_byte
        if self._source[opener + 1 : opener + 2].isspace():
            return opener + 1
        before_opener = self._source[node.start_byte : opener].rstrip()
        return node.start_byte + len(before_opener)

    def _docstring(self, body: Node) -> tuple[tuple[int, int], str] | None:
        """The place of Python's docstring, and what it says."""
        first = next((child for child in body.named_children if child.type != "comment"), None)
        if first is None or first.type != "expression_statement" or len(first.named_children) != 1:
            return None
        string = first.named_children[0]
        if string.type != "string":
            return None
        content = "".join(self._text(child) for child in string.children if child.type == "string_content")
        return (first.start_byte, first.end_byte), dedented(content)

    def _lines(self, start: int, end: int) -> tuple[int, int]:
        """With the indentation before and the line break behind, where nothing else is in the lines."""
        begin = line_start(self._source, start)
        if self._source[end - 1 : end] != b"\n" and self._source[end : end + 1] == b"\n":
            end += 1
        return begin, end

    def _header(self, outer: Node, node: Node, body: Node) -> str:
        """From behind comments, decorators and annotations to what opens the body, with the indentation in front."""
        start = outer.start_byte
        for child in (*outer.children, *node.children):
            if child.type == "decorator":
                start = max(start, child.end_byte)
            elif child.type == "modifiers":  # Java's annotations
                notes = [part.end_byte for part in child.children if part.type.endswith("annotation")]
                start = max([start, *notes])
        while self._source[start : start + 1].isspace():
            start += 1
        begin = self._source.rfind(b"\n", 0, outer.start_byte) + 1
        indent = self._source[begin : line_indent(self._source, begin)]
        return (indent + self._source[start : self._split(node, body)]).decode().rstrip()

    def _kind(self, node: Node, scope: _Scope) -> str:
        kind = self._language.items[node.type]
        if kind == "type":
            return _c_or_go_kind(node)
        return "method" if kind == "function" and (scope.is_type or self._is_outside_method(node)) else kind

    def _is_outside_method(self, node: Node) -> bool:
        """C++ defines methods outside their class: `int Parser::next()`."""
        return self._language.name == "cpp" and "::" in self._declared_name(node)

    def _name(self, node: Node, scope: _Scope) -> str:
        name = self._type_name(node)
        if node.type == "impl_item" and (trait := node.child_by_field_name("trait")) is not None:
            name = f"{self._text(trait)} for {name}"
        if node.type == "method_declaration" and (receiver := node.child_by_field_name("receiver")) is not None:
            found = re.search(r"\*?\s*(\w+)\s*(\[.*\])?\s*\)$", self._text(receiver))
            name = f"{found[1]}.{name}" if found else name
        # a nameless one stays nameless wherever it stands
        return " ".join(self._language.joint.join((*scope.names, name)).split()) if name else ""

    def _type_name(self, node: Node) -> str:
        if node.type == "impl_item":
            type_ = node.child_by_field_name("type")
            return "" if type_ is None else self._text(type_)
        return self._declared_name(node)

    def _declared_name(self, node: Node) -> str:
        found = node.child_by_field_name("name")
        if found is not None:
            return self._text(found)
        for inner in node.named_children:
            name = inner.child_by_field_name("name" if inner.type in ("variable_declarator", "type_spec") else "left")
            if name is not None:
                return self._text(name)
        declarator = node.child_by_field_name("declarator")
        while declarator is not None and declarator.type != "qualified_identifier":
            inner_declarator = declarator.child_by_field_name("declarator")
            if inner_declarator is None and declarator.type == "reference_declarator":
                inner_declarator = declarator.named_children[-1]
            if inner_declarator is None:
                break
            declarator = inner_declarator
        return "" if declarator is None else " ".join(self._text(declarator).split())


def _function_value(node: Node) -> Node | None:
    """Of `const f = (…) => {…}` or `exports.f = function () {…}`, the function's body."""
    types = ("variable_declarator", "assignment_expression")
    assigned = [child for child in node.named_children if child.type in types]
    value = None
    if len(assigned) == 1:
        value = assigned[0].child_by_field_name("value") or assigned[0].child_by_field_name("right")
    if value is None or value.type not in _FUNCTION_VALUES:
        return None
    body = value.child_by_field_name("body")
    return body if body is not None and body.type == "statement_block" else None


def _go_body(node: Node) -> Node | None:
    """Of `type T struct {…}`; a group of types in parentheses is none."""
    specs = [child for child in node.named_children if child.type == "type_spec"]
    type_ = specs[0].child_by_field_name("type") if len(specs) == 1 and len(node.named_children) == 1 else None
    if type_ is None or any(child.type == "(" for child in node.children):
        return None
    if type_.type == "struct_type":
        return type_.named_children[0] if type_.named_children else None
    return type_ if type_.type == "interface_type" else None


def _c_or_go_kind(node: Node) -> str:
    """What `type` or `typedef` names."""
    inner = node.child_by_field_name("type")
    if inner is None:
        spec = next((child for child in node.named_children if child.type == "type_spec"), None)
        inner = None if spec is None else spec.child_by_field_name("type")
    kinds = {"struct": "struct", "union": "union", "enum": "enum", "interface": "interface"}
    return kinds.get("" if inner is None else inner.type.split("_")[0], "type")


# --- the text of comments ---------------------------------------------------------------------------------------------

_LINE_MARK = re.compile(r"^\s*(//[/!]?|#)<? ?")
_STAR = re.compile(r"^\s*\*(?: |$)")
_RULE = re.compile(r"^[\s=*#~_+/-]*$")


def comment_text(comments: Sequence[str]) -> str:
    """What comments say, without their marks and the lines drawn around them."""
    lines: list[str] = []
    for comment in comments:
        if comment.startswith("/*"):
            inner = re.sub(r"^/\*+[!<]?", "", comment.rstrip()).removesuffix("*/").rstrip("*")
            rows = inner.splitlines()
            starred = sum(1 for row in rows[1:] if _STAR.match(row)) * 2 > len([row for row in rows[1:] if row.strip()])
            lines += [_STAR.sub("", row) if starred else row for row in rows]
        else:
            lines += [_LINE_MARK.sub("", row) for row in comment.splitlines()]
    kept = ["" if len(line.strip()) != 1 and _RULE.match(line) else line.rstrip() for line in lines]
    return dedented("\n".join(kept))


def dedented(text: str) -> str:
    """Without the indentation that all lines but the first share, which begins behind the mark."""
    first, _, rest = text.expandtabs(8).partition("\n")
    lines = rest.splitlines()
    indents = [len(line) - len(line.lstrip()) for line in lines if line.strip()]
    margin = min(indents, default=0)
    return "\n".join([first.strip(), *(line[margin:].rstrip() for line in lines)]).strip()


def unindented(code: str) -> str:
    """Without the indentation of the first line, if every line has it, and without blank lines around."""
    first = code[: len(code) - len(code.lstrip(" \t"))]
    lines = code.split("\n")
    if not first or not all(line.startswith(first) or not line.strip() for line in lines):
        return code.strip("\n")
    return "\n".join(line[len(first) :] for line in lines).strip("\n")


def line_indent(source: bytes, begin: int) -> int:
    """Where the indentation of the line that begins at `begin` ends."""
    end = begin
    while source[end : end + 1] in (b" ", b"\t"):
        end += 1
    return end
