"""What of each language's grammar is an item, a comment, a doc comment."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tree_sitter import Parser

_SLASHES = re.compile(r"//.*|/\*.*", re.DOTALL)
_JAVADOC = re.compile(r"/\*\*(?!/).*", re.DOTALL)
_RUSTDOC = re.compile(r"///(?!/).*|/\*\*(?![*/]).*", re.DOTALL)


@dataclass(frozen=True)
class Language:
    """A language, by the node types of its tree-sitter grammar."""

    name: str
    title: str
    """As people write it."""
    module: str
    suffixes: tuple[str, ...]
    items: Mapping[str, str]
    """Node type -> kind of item, in words."""
    types: frozenset[str]
    """Items whose functions are methods."""
    scopes: frozenset[str] = frozenset()
    """Nodes that are no items, but hold some: modules, namespaces, conditions of a preprocessor."""
    wrappers: frozenset[str] = frozenset()
    """Nodes around an item that belong to it: `export`, decorators, `template`."""
    comments: frozenset[str] = frozenset({"comment"})
    attributes: frozenset[str] = frozenset()
    """What stands before an item as a node of its own and belongs to it."""
    doc: re.Pattern[str] | None = None
    """Which comments in front of an item describe it; None where a docstring does."""
    joint: str = "."
    """Between a type's and its method's name."""
    factory: str = "language"
    extra: Mapping[str, str] = field(default_factory=dict)
    """Suffix -> factory of another grammar of the module."""


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_PREPROCESSOR = "preproc_ifdef preproc_if preproc_else preproc_elif preproc_elifdef linkage_specification"
_SCRIPT_ITEMS = {
    "function_declaration": "function",
    "generator_function_declaration": "function",
    "class_declaration": "class",
    "method_definition": "method",
    "lexical_declaration": "function",
    "variable_declaration": "function",
    "expression_statement": "function",
}
_C_ITEMS = {
    "function_definition": "function",
    "struct_specifier": "struct",
    "union_specifier": "union",
    "enum_specifier": "enum",
    "type_definition": "type",
}

LANGUAGES: Mapping[str, Language] = {
    language.name: language
    for language in (
        Language(
            "python",
            "Python",
            "tree_sitter_python",
            (".py", ".pyi"),
            items={"function_definition": "function", "class_definition": "class"},
            types=_set("class_definition"),
            scopes=_set("if_statement else_clause elif_clause try_statement except_clause block with_statement"),
            wrappers=_set("decorated_definition"),
        ),
        Language(
            "rust",
            "Rust",
            "tree_sitter_rust",
            (".rs",),
            items={
                "function_item": "function",
                "impl_item": "impl",
                "struct_item": "struct",
                "enum_item": "enum",
                "union_item": "union",
                "trait_item": "trait",
                "macro_definition": "macro",
            },
            types=_set("impl_item trait_item"),
            scopes=_set("mod_item declaration_list foreign_mod_item"),
            comments=_set("line_comment block_comment"),
            attributes=_set("attribute_item"),
            doc=_RUSTDOC,
            joint="::",
        ),
        Language(
            "javascript",
            "JavaScript",
            "tree_sitter_javascript",
            (".js", ".mjs", ".cjs", ".jsx"),
            items=_SCRIPT_ITEMS,
            types=_set("class_declaration"),
            wrappers=_set("export_statement"),
            attributes=_set("decorator"),
            doc=_JAVADOC,
        ),
        Language(
            "typescript",
            "TypeScript",
            "tree_sitter_typescript",
            (".ts", ".mts", ".cts", ".tsx"),
            items={
                **_SCRIPT_ITEMS,
                "abstract_class_declaration": "class",
                "interface_declaration": "interface",
                "enum_declaration": "enum",
                "type_alias_declaration": "type",
            },
            types=_set("class_declaration abstract_class_declaration"),
            scopes=_set("internal_module module statement_block ambient_declaration expression_statement"),
            wrappers=_set("export_statement"),
            attributes=_set("decorator"),
            doc=_JAVADOC,
            factory="language_typescript",
            extra={".tsx": "language_tsx"},
        ),
        Language(
            "go",
            "Go",
            "tree_sitter_go",
            (".go",),
            items={"function_declaration": "function", "method_declaration": "method", "type_declaration": "type"},
            types=frozenset(),
            doc=_SLASHES,
        ),
        Language(
            "java",
            "Java",
            "tree_sitter_java",
            (".java",),
            items={
                "class_declaration": "class",
                "interface_declaration": "interface",
                "enum_declaration": "enum",
                "record_declaration": "record",
                "annotation_type_declaration": "annotation",
                "method_declaration": "method",
                "constructor_declaration": "constructor",
            },
            types=_set("class_declaration interface_declaration enum_declaration record_declaration"),
            scopes=_set("enum_body_declarations"),
            comments=_set("line_comment block_comment"),
            doc=_JAVADOC,
        ),
        Language(
            "c",
            "C",
            "tree_sitter_c",
            (".c", ".h"),
            items=_C_ITEMS,
            types=frozenset(),
            scopes=_set(f"{_PREPROCESSOR} declaration_list"),
            doc=_SLASHES,
        ),
        Language(
            "cpp",
            "C++",
            "tree_sitter_cpp",
            (".cc", ".cpp", ".cxx", ".hh", ".hpp", ".hxx"),
            items={**_C_ITEMS, "class_specifier": "class", "concept_definition": "concept"},
            types=_set("class_specifier struct_specifier"),
            scopes=_set(f"{_PREPROCESSOR} declaration_list namespace_definition"),
            wrappers=_set("template_declaration field_declaration"),
            doc=_SLASHES,
            joint="::",
        ),
    )
}

_BY_SUFFIX = {suffix: language for language in LANGUAGES.values() for suffix in language.suffixes}
_CPP_WORDS = re.compile(rb"^\s*(class\s+\w|namespace\b|template\s*<|using\s+\w|public:|private:)", re.MULTILINE)


def language_by_name(name: str) -> Language | None:
    """The language that a file's name says; a C header may turn out to be C++ by its content."""
    dot = name.rfind(".")
    return _BY_SUFFIX.get(name[dot:].lower()) if dot > name.rfind("/") + 1 else None


def language_of(name: str, content: bytes) -> Language | None:
    """The language of a file."""
    language = language_by_name(name)
    if language is not None and language.name == "c" and name.endswith(".h") and _CPP_WORDS.search(content):
        return LANGUAGES["cpp"]
    return language


def parser_of(language: Language, name: str) -> Parser:
    """The parser for a file of this name."""
    dot = name.rfind(".")
    return _parser(language.module, language.extra.get(name[dot:].lower(), language.factory))


@cache
def _parser(module: str, factory: str) -> Parser:
    import tree_sitter

    grammar = getattr(importlib.import_module(module), factory)()
    return tree_sitter.Parser(tree_sitter.Language(grammar))


def grammar_versions(names: tuple[str, ...]) -> dict[str, str]:
    """Package -> version, of tree-sitter and the grammars of these languages."""
    from importlib.metadata import version

    packages = ["tree-sitter", *(LANGUAGES[name].module.replace("_", "-") for name in names)]
    return {package: version(package) for package in packages}
