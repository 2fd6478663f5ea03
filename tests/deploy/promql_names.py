"""Which metrics a PromQL expression reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import promql_parser
from promql_parser import MatchOp


def metric_patterns(expression: str) -> set[str]:
    """Return the names that `expression` selects, as regular expressions.

    Raises ValueError when the expression is not PromQL.
    """
    return set(_patterns(promql_parser.parse(expression)))


def _patterns(node: Any) -> Iterator[str]:
    if isinstance(node, list):
        for child in node:
            yield from _patterns(child)
    elif isinstance(node, promql_parser.VectorSelector):
        yield _pattern(node)
    else:
        for name in ("lhs", "rhs", "expr", "args", "param", "vector_selector"):
            child = getattr(node, name, None)
            if child is not None:
                yield from _patterns(child)


def _pattern(selector: promql_parser.VectorSelector) -> str:
    if selector.name:
        return str(selector.name)
    for matcher in selector.matchers.matchers:
        if matcher.name == "__name__" and matcher.op in (MatchOp.Re, MatchOp.Equal):
            return str(matcher.value)
    raise ValueError(f"{selector} selects no metric by name")
