"""What a seam looks like in source text: the counterpart of `compatibility.describe`, by `ast`."""

from __future__ import annotations

import ast
from collections.abc import Iterable

from sglang_releases import ReleaseSource

from sglang_alloc.compatibility import Definition, Signature


def find_definition(release: ReleaseSource, target: str) -> Definition | None:
    """Return what the release's source defines at a dotted path, or None if nothing does."""
    module, _, rest = _split_module(release, target)
    if module is None:
        return None
    node: ast.AST | None = ast.parse(module)
    for name in rest.split("."):
        node = _member(node, name)
    return None if node is None else _describe_node(node)


def calls(release: ReleaseSource, module: str, function: str) -> list[ast.Call]:
    """Return every call of a function by its bare name in one module."""
    return [
        node
        for node in ast.walk(_parsed(release, module))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == function
    ]


def functions(release: ReleaseSource, module: str, name: str) -> list[ast.FunctionDef]:
    """Return every function or method of this name in one module, in order."""
    return [
        node
        for node in ast.walk(_parsed(release, module))
        if isinstance(node, ast.FunctionDef) and node.name == name
    ]


def enum_values(release: ReleaseSource, module: str, name: str) -> set[str]:
    """Return the string values that the members of a class stand for."""
    (owner,) = (
        node
        for node in _parsed(release, module).body
        if isinstance(node, ast.ClassDef) and node.name == name
    )
    return {
        statement.value.value
        for statement in owner.body
        if isinstance(statement, ast.Assign)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    }


def annotated_fields(release: ReleaseSource, *modules: str) -> set[str]:
    """Return the names that classes in these modules, or below them, declare with a type."""
    trees = [ast.parse(text) for module in modules for text in release.texts_under(module)]
    classes = [node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
    return {
        statement.target.id
        for node in classes
        for statement in node.body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
    }


def _split_module(release: ReleaseSource, target: str) -> tuple[str | None, str, str]:
    """Split a dotted path behind its longest prefix that is a module: (source, prefix, rest)."""
    parts = target.split(".")
    for length in range(len(parts) - 1, 0, -1):
        prefix = ".".join(parts[:length])
        text = release.module_text(prefix)
        if text is not None:
            return text, prefix, ".".join(parts[length:])
    return None, "", target


def _member(owner: ast.AST | None, name: str) -> ast.AST | None:
    for node in getattr(owner, "body", []):
        if getattr(node, "name", None) == name:
            return node
        if isinstance(node, ast.Assign) and name in _assigned(node.targets):
            return node
    return None


def _describe_node(node: ast.AST) -> Definition:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return _signature(node)
    if isinstance(node, ast.ClassDef):
        return frozenset(_class_names(node))
    assert isinstance(node, ast.Assign)
    value = ast.literal_eval(node.value)
    assert isinstance(value, str)
    return value


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> Signature:
    arguments = node.args
    leading = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    if any(isinstance(d, ast.Name) and d.id == "classmethod" for d in node.decorator_list):
        leading = leading[1:]
    by_name = {argument.arg for argument in (*arguments.args, *arguments.kwonlyargs)}
    return Signature(tuple(leading), frozenset(by_name))


def _class_names(node: ast.ClassDef) -> Iterable[str]:
    """Yield fields, members and methods of a class, and what its methods assign to `self`."""
    for statement in node.body:
        if isinstance(statement, ast.Assign):
            yield from _assigned(statement.targets)
        elif isinstance(statement, ast.AnnAssign):
            yield from _assigned([statement.target])
        elif isinstance(statement, ast.FunctionDef):
            yield statement.name
            yield from _assigned_to_self(statement)


def _assigned_to_self(method: ast.FunctionDef) -> Iterable[str]:
    for node in ast.walk(method):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and node.value.id == "self"
        ):
            yield node.attr


def _assigned(targets: list[ast.expr]) -> list[str]:
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _parsed(release: ReleaseSource, module: str) -> ast.Module:
    text = release.module_text(module)
    assert text is not None, f"there is no module {module}"
    return ast.parse(text)
