"""Control story, before the first step: one YAML file as a mapping, duplicate keys refused."""

from pathlib import Path
from typing import Any

import yaml

from sglang_alloc.errors import ConfigurationError


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML lets a later key silently replace an earlier one, which hides a typing mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if str(key_node.value) in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key_node.value} is there twice",
                    problem_mark=key_node.start_mark,
                )
            seen.add(str(key_node.value))
        return super().construct_mapping(node, deep)


def read_mapping(path: Path) -> dict[str, Any]:
    """Read the YAML file `path`, whose top level must be a mapping.

    Raises:
        ConfigurationError: the file cannot be read, or is not such YAML.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(
            f"Cannot read the configuration {path}: {error.strerror}. Give the path of a YAML file."
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path} is not UTF-8 text ({error.reason}).") from error
    try:
        content = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{path} is not valid YAML: {_one_line(error)}.") from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        # PyYAML lets these through, of a date that is none, say, or of nesting without an end.
        raise ConfigurationError(f"{path} holds a value that cannot be read: {error}.") from error
    if not isinstance(content, dict):
        found = "empty" if content is None else f"a {type(content).__name__}"
        raise ConfigurationError(f"{path} is {found}; it must hold keys such as table and slo.")
    return content


def _one_line(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem}, line {error.problem_mark.line + 1}"
    return " ".join(str(error).split())
