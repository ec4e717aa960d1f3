"""Small changes to a module's syntax tree, each at one place: what a slip of the pen would make of it.

A mutation is named by its module and its number, which stays as long as the module does.
"""

import ast
import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

_COMPARED: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,), ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}  # fmt: skip
_COMPUTED: dict[type[ast.operator], tuple[type[ast.operator], ...]] = {
    ast.Add: (ast.Sub,), ast.Sub: (ast.Add,), ast.Mult: (ast.Div,), ast.Div: (ast.Mult,), ast.FloorDiv: (ast.Mult,),
    ast.Mod: (ast.Mult,), ast.Pow: (ast.Mult,), ast.BitAnd: (ast.BitOr,), ast.BitOr: (ast.BitAnd,),
}  # fmt: skip
Change = Callable[[ast.AST], ast.AST | None]  # of a copy of the node: what comes in its place; None: it itself, changed


@dataclass(frozen=True)
class Mutation:
    """`number`: its place among those of its module. `function`: the first line of the one it is in; 0: in none."""

    path: str
    number: int
    line: int
    said: str
    function: int
    _change: Change
    _node: int  # its place among the nodes of the tree

    @property
    def name(self) -> str:
        return f"{self.path}:{self.number}"

    def apply(self, source: str) -> ast.Module:
        """The tree of the module with this change made."""
        tree = ast.parse(source)
        parent, name, at, node = next(islice(_places(tree), self._node, None))
        made = self._change(node)
        if made is not None:
            _put(parent, name, at, ast.copy_location(made, node))
        ast.fix_missing_locations(node if made is None else made)
        return tree


def mutations(path: str, source: str) -> list[Mutation]:
    """All of the module, in the order of its lines. Docstrings, annotations and messages of errors are left alone."""
    made: list[Mutation] = []
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    for place, (parent, _, _, node) in enumerate(_places(tree)):
        for said, change in _changes(parent, node):
            line = getattr(node, "lineno", getattr(parent, "lineno", 0))
            made.append(Mutation(path, len(made), line, said, _function(functions, line), change, place))
    return made


def _function(functions: Iterable[ast.FunctionDef | ast.AsyncFunctionDef], line: int) -> int:
    """The first line, as its code object has it, of the innermost one in whose body the line is; 0 if it is in none."""
    around = [node for node in functions if node.body[0].lineno <= line <= (node.end_lineno or 0)]
    if not around:
        return 0
    inner = max(around, key=lambda node: node.lineno)
    return min([inner.lineno, *(each.lineno for each in inner.decorator_list)])


Place = tuple[ast.AST, str, int | None, ast.AST]  # parent, field, index in the field, node


def _places(tree: ast.AST) -> Iterator[Place]:
    for name, value in ast.iter_fields(tree):
        if _is_prose(tree, name):
            continue
        for at, node in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(node, ast.AST):
                yield tree, name, at, node
                yield from _places(node)


def _is_prose(node: ast.AST, name: str) -> bool:
    """What no test can or should hold: types, docstrings, what an error says, and imports."""
    if isinstance(node, ast.JoinedStr | ast.Import | ast.ImportFrom):
        return True
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True
    if isinstance(node, ast.Assert):
        return name == "msg"
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("NewType", "TypeVar"):
        return True
    if name == "decorator_list" or (isinstance(node, ast.keyword) and node.arg in ("frozen", "kw_only", "repr")):
        return True  # frozen, kw_only: what the type checker holds
    return name in ("annotation", "returns", "type_comment", "bases", "type_params") or (
        isinstance(node, ast.Subscript) and name == "slice" and _is_type(node.value)
    )


def _is_type(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and (
        node.id[:1].isupper() or node.id in ("dict", "list", "tuple", "type", "frozenset")
    )


def _put(parent: ast.AST, name: str, at: int | None, made: ast.AST) -> None:
    if at is None:
        setattr(parent, name, made)
    else:
        getattr(parent, name)[at] = made


# ---- what is changed


def _changes(parent: ast.AST, node: ast.AST) -> Iterator[tuple[str, Change]]:
    match node:
        case ast.Compare():
            for at, operator in enumerate(node.ops):
                for other in _COMPARED[type(operator)]:
                    yield _named(operator, other), lambda n, at=at, other=other: n.ops.__setitem__(at, other())  # type: ignore[misc]
        case ast.BinOp():
            for binary in _COMPUTED.get(type(node.op), ()):
                yield _named(node.op, binary), lambda n, other=binary: setattr(n, "op", other())  # type: ignore[misc]
        case ast.AugAssign():
            for binary in _COMPUTED.get(type(node.op), ()):
                yield _named(node.op, binary), lambda n, other=binary: setattr(n, "op", other())  # type: ignore[misc]
        case ast.UnaryOp(op=ast.USub()) | ast.UnaryOp(op=ast.Not()):
            yield f"{ast.unparse(node)} without its {type(node.op).__name__}", lambda n: n.operand  # type: ignore[attr-defined]
        case ast.BoolOp():
            other_op = ast.Or if isinstance(node.op, ast.And) else ast.And
            yield _named(node.op, other_op), lambda n: setattr(n, "op", other_op())
        case ast.IfExp():
            yield "the other branch", lambda n: ast.IfExp(n.test, n.orelse, n.body)  # type: ignore[attr-defined]
        case ast.If() | ast.While():
            yield f"not ({ast.unparse(node.test)})", _negate
        case ast.Constant():
            yield from _constants(parent, node)
        case ast.Return(value=ast.expr()) if not _is_false(node.value):
            yield "return None", lambda _: ast.Return(ast.Constant(None))
        case ast.Expr(value=ast.Call() | ast.Await()) | ast.Raise() | ast.Continue() | ast.Break():
            yield f"without {_short(node)}", lambda _: ast.Pass()
        case ast.Call():
            yield from _calls(node)
        case ast.Subscript(slice=ast.Slice(), ctx=ast.Load()):
            yield "the whole of it", lambda n: n.value  # type: ignore[attr-defined]
        case ast.ExceptHandler(type=ast.expr()):
            yield "catches nothing", lambda n: setattr(n, "type", ast.Tuple([], ast.Load()))
    if isinstance(node, ast.AugAssign):
        yield f"without {_short(node)}", lambda _: ast.Pass()


def _negate(node: ast.AST) -> None:
    assert isinstance(node, ast.If | ast.While), "asked for these only"
    node.test = ast.UnaryOp(ast.Not(), node.test)


def _constants(parent: ast.AST, node: ast.Constant) -> Iterator[tuple[str, Change]]:
    value = node.value
    if isinstance(value, bool):
        yield f"{value} -> {not value}", lambda _: ast.Constant(not value)
    elif isinstance(value, int):
        for other in (value + 1, value - 1):
            yield f"{value} -> {other}", lambda _, other=other: ast.Constant(other)  # type: ignore[misc]
    elif isinstance(value, float):
        for twice in (value * 2 or 1.0, -value or -1.0):
            yield f"{value} -> {twice}", lambda _, other=twice: ast.Constant(other)  # type: ignore[misc]
    elif isinstance(value, str) and not _is_sentence(value):
        yield f"{value!r} -> {value + 'x'!r}", lambda _: ast.Constant(value + "x")


def _is_sentence(text: str) -> bool:
    return " " in text.strip()


def _calls(node: ast.Call) -> Iterator[tuple[str, Change]]:
    plain = [at for at, argument in enumerate(node.args) if not isinstance(argument, ast.Starred)]
    if isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "getattr", "cast", "TypeVar"):
        return
    symmetric = ast.unparse(node.func).rpartition(".")[2] in (
        "min",
        "max",
        "minimum",
        "maximum",
        "hypot",
        "compare_digest",
    )
    if len(plain) > 1 and not symmetric and ast.dump(node.args[plain[0]]) != ast.dump(node.args[plain[1]]):
        yield f"{_short(node)} with its first two swapped", lambda n: _swap(n, plain[0], plain[1])
    if isinstance(node.func, ast.Name) and node.func.id in ("min", "max"):
        other = {"min": "max", "max": "min"}[node.func.id]
        yield f"{node.func.id} -> {other}", lambda n: setattr(n, "func", ast.Name(other, ast.Load()))
    for at, keyword in enumerate(node.keywords):
        if keyword.arg is not None:
            yield f"{_short(node)} without {keyword.arg}", lambda n, at=at: n.keywords.pop(at) and None  # type: ignore[misc]


def _swap(node: ast.AST, one: int, other: int) -> None:
    assert isinstance(node, ast.Call), "asked for these only"
    node.args[one], node.args[other] = node.args[other], node.args[one]


def _is_false(node: ast.AST | None) -> bool:
    """Whether None in its place is the same to any condition."""
    return isinstance(node, ast.Constant) and (node.value is None or node.value is False)


def _named(old: ast.AST, new: type) -> str:
    return f"{type(old).__name__} -> {new.__name__}"


def _short(node: ast.AST) -> str:
    text = " ".join(ast.unparse(copy.deepcopy(node)).split())
    return text if len(text) <= 60 else text[:57] + "..."
