"""The text of a test: compiled, and what can be told of it without running it."""

import ast
import builtins
import re
import symtable
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from types import CodeType
from typing import Any

_NAN = re.compile(r"\b(is)?nan\b", re.IGNORECASE)
_MODULE_NAMES = ("__name__", "__annotations__", "__builtins__")


@dataclass(frozen=True)
class Source:
    """`wanted`: names that the test uses and neither makes itself nor has from Python.

    `expects_errors`: something in it can mean to catch an exception. `expects_nan`: it speaks of NaN.
    """

    text: str
    code: CodeType
    wanted: frozenset[str]
    expects_errors: bool
    expects_nan: bool

    @staticmethod
    def read(text: str) -> "Source":
        """Raises whatever compiling raises, where it is no Python."""
        tree = ast.parse(text, "tests")
        # Never without asserts, however this Python was started.
        code: CodeType = compile(tree, "tests", "exec", dont_inherit=True, optimize=0)
        wanted = frozenset() if _imports_everything(tree) else frozenset(_wanted(text))
        return Source(text, code, wanted, any(map(_catches, ast.walk(tree))), _NAN.search(text) is not None)

    def lacks(self, names: Collection[str]) -> bool:
        """Whether the test uses something that is not there."""
        return not self.wanted.issubset(names)


def _catches(node: ast.AST) -> bool:
    """`try`, `with`, and calls as `assertRaises(ValueError, f, 1)`."""
    name: Any = getattr(node, "attr", None) or getattr(node, "id", None)
    kinds = (ast.Try, ast.TryStar, ast.With, ast.AsyncWith)
    return isinstance(node, kinds) or (isinstance(name, str) and "raises" in name.lower())


def _imports_everything(tree: ast.Module) -> bool:
    return any(isinstance(node, ast.ImportFrom) and node.names[0].name == "*" for node in ast.walk(tree))


def _wanted(text: str) -> set[str]:
    module = symtable.symtable(text, "tests", "exec")
    used, made = set[str](), {*dir(builtins), *_MODULE_NAMES}
    for table in _tables(module):
        for symbol in table.get_symbols():
            if table is module or symbol.is_global():
                used |= {symbol.get_name()} if symbol.is_referenced() else set()
                made |= {symbol.get_name()} if symbol.is_assigned() or symbol.is_imported() else set()
    return used - made


def _tables(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    yield table
    for child in table.get_children():
        yield from _tables(child)
