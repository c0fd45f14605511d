"""YAML 1.2 as people write it: read with the file and line of every key, to be named in errors.

Every YAML file that a person writes is read here, and so are the values of `--config`. 010 is ten,
1e-3 is a number, and 1:30 and yes are text. The same key twice in one mapping is an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode

from ptbench.errors import ConfigurationError


class Located(dict[Any, Any]):
    """A mapping that knows where each of its keys was written: `file, line N`."""

    def __init__(
        self, values: Mapping[Any, Any] | None = None, places: Mapping[Any, str] | None = None
    ) -> None:
        super().__init__(values or {})
        self.places: dict[Any, str] = dict(places or {})


class Constructor(SafeConstructor):
    """Makes a `Located` of every mapping."""

    file = ""  # the text's name in errors

    def construct_yaml_map(self, node: MappingNode) -> Iterator[Located]:
        result = Located()
        yield result  # first, because what is inside may refer to it
        for key, _ in node.value:
            place = f"{self.file}, line {key.start_mark.line + 1}"
            if not isinstance(key, ScalarNode):
                raise ConfigurationError(f"{place}: not valid YAML: a key must be one word")
            if key.value in result.places:
                raise ConfigurationError(f"{place}: not valid YAML: {key.value} is there twice")
            result.places[key.value] = place
        result.update(self.construct_mapping(node))


Constructor.add_constructor("tag:yaml.org,2002:map", Constructor.construct_yaml_map)


@cache
def _reader() -> YAML:
    reader = YAML(typ="safe", pure=True)  # libyaml, the other choice, reads YAML 1.1
    reader.Constructor = Constructor
    return reader


def parse_yaml(text: str, name: str) -> Any:
    """Return the content of a YAML text; its mappings are `Located`.

    Args:
        name: of the text, for errors.

    Raises:
        ConfigurationError: with name and line, if it is not valid YAML.
    """
    reader = _reader()
    reader.constructor.file = name
    try:
        return reader.load(text)
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", "cannot be read")
        raise ConfigurationError(f"{name}{line}: not valid YAML: {problem}") from error


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file.

    Raises:
        ConfigurationError: with the file, and the line or byte, if it cannot be read.
    """
    name = shown_path(path)
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise ConfigurationError(f"cannot read {name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{name}: not UTF-8 at byte {error.start}") from error
    return parse_yaml(text, name)


def read_mapping(path: Path) -> Located:
    """Return the content of a YAML file that holds one mapping, or nothing.

    Raises:
        ConfigurationError: as `read_yaml`, and if it holds something else.
    """
    content = read_yaml(path)
    if content is None:
        return Located()
    if not isinstance(content, Located):
        raise ConfigurationError(
            f"{shown_path(path)}: must be a mapping of keys to values, such as `seeds: [1, 2]`"
        )
    return content


def shown_path(path: Path) -> str:
    """Return a path as errors show it: relative to the working directory, if it is in there."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def merged(base: Mapping[Any, Any], changes: Mapping[Any, Any]) -> Located:
    """Return `base` with the keys of `changes` in place of its own, mappings merged in turn."""
    result = Located(base, getattr(base, "places", {}))
    result.places |= getattr(changes, "places", {})
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if both else value
    return result


def place_of(content: Any, location: Sequence[str | int], otherwise: str) -> str:
    """Return where the value at `location` was written, or the nearest thing around it.

    Args:
        location: keys and indices that lead to it.
        otherwise: what to return if nothing is known.
    """
    found = otherwise
    for key in location:
        if isinstance(content, Located):
            found = content.places.get(key, found)
        try:
            content = content[key]
        except (KeyError, IndexError, TypeError):
            break
    return found
