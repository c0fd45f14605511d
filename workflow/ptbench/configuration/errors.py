"""Errors that teach: where the mistake is, what was written, and what is allowed."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from ptbench.errors import ConfigurationError
from ptbench.model.recipe import NAME_PATTERN, Model
from ptbench.yaml import place_of

M = TypeVar("M", bound=Model)

# Names of the alternatives that pydantic tries for a corpus, which it puts into places.
KINDS = ("download", "folder", "synthetic")
PROCESSES = ("markov", "high-rank", "zipf")


def parse(model: type[M], content: Any, source: str, label: str = "") -> M:
    """Return a model made from plain values.

    Args:
        content: what was read; where it is `Located`, errors name file and line.
        source: the place that errors name otherwise.
        label: what they put behind the place, such as the name of the recipe.

    Raises:
        ConfigurationError: with one line for each problem.
    """
    prefix = f"{label}: " if label else ""
    if not isinstance(content, Mapping):
        raise ConfigurationError(f"{source}: {prefix}must be a mapping of keys to values")
    try:
        # As JSON: pydantic's strict mode takes a JSON list for a tuple, but not true for 1.
        return model.model_validate_json(json.dumps(dict(content), default=str), strict=True)
    except ValidationError as error:
        sentences = [
            f"{place_of(content, without_tags(problem['loc']), source)}: {prefix}"
            f"{sentence(problem, model)}"
            for problem in relevant(error.errors())
        ]
        raise ConfigurationError("\n".join(dict.fromkeys(sentences))) from error


def relevant(problems: Collection[Any]) -> Iterable[Any]:
    """Leave out what pydantic reports only because of another problem."""
    for problem in problems:
        place, kind = problem["loc"], problem["type"]
        # A variant may be text or a mapping; only the problem with the form it has is reported.
        if "str" in place and isinstance(problem["input"], dict):
            continue
        if "Variant" in place and kind == "model_type":
            continue
        # A list whose items are wrong is reported as empty too.
        within = (other["loc"][: len(place)] == place for other in problems if other is not problem)
        if kind == "too_short" and any(within):
            continue
        yield problem


def sentence(problem: Any, model: type[Model]) -> str:
    """Write one of pydantic's errors as `key: value is not allowed: what is`."""
    kind, context = problem["type"], problem.get("ctx", {})
    path, value = without_tags(problem["loc"]), problem["input"]
    if kind in ("union_tag_invalid", "union_tag_not_found"):  # the key that decides is at fault
        path.append(context["discriminator"].strip("'"))
        kind, value = ("missing", None) if kind == "union_tag_not_found" else (kind, context["tag"])
    subject = "the name " if path[-1:] == ["[key]"] else ""
    if subject:
        path.pop()
    where = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).lstrip(".")
    where = f"{where}: " if where else ""
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if kind == "extra_forbidden":
        hint = suggestion(str(path[-1]), model.model_fields) if len(path) == 1 else ""
        return f"{where}there is no such key{hint}"
    if kind == "missing":
        return f"{where}is required"
    if kind == "value_error":
        return where + message
    allowed = {
        "list_type": "should be a list, such as [a, b]",
        "path_type": "should be a path",
        "too_short": f"should have at least {context.get('min_length')} item",
        "union_tag_invalid": f"should be {context.get('expected_tags')}",
    }
    if kind == "string_pattern_mismatch" and context["pattern"] == NAME_PATTERN:
        message = "should be lower-case letters, digits, dots and hyphens"
    else:
        message = allowed.get(kind, message.replace("an object", "a mapping"))
    return f"{where}{subject}{shown(value)} is not allowed: {message}"


def without_tags(location: tuple[str | int, ...]) -> list[str | int]:
    """Return a place as its author wrote it, without the names of alternatives that were tried."""
    path = list(location)
    if path[:1] == ["corpora"]:  # corpora, name, kind, perhaps process, then the key
        kind = path.pop(2) if path[2:3] and path[2] in KINDS else None
        if kind == "synthetic" and path[2:3] and path[2] in PROCESSES:
            path.pop(2)
    if "variants" in path:
        after = path.index("variants") + 2
        if path[after : after + 1] in (["str"], ["Variant"]):
            del path[after]
    return path


def shown(value: object) -> str:
    """Return a value as an error shows it: on one line and not too long."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def known(name: str, names: Collection[str], where: str, kind: str) -> str:
    """Return `name` if it is among `names`.

    Raises:
        ConfigurationError: if it is not; says what was probably meant.
    """
    if name not in names:
        raise ConfigurationError(
            f"{where}: there is no {kind} {shown(name)}{suggestion(str(name), names)}"
        )
    return name


def suggestion(name: str, names: Collection[str]) -> str:
    """Return what was probably meant, and what there is, unless that is much."""
    close = difflib.get_close_matches(name, list(names), n=1)
    if not close:
        return f"; there are {', '.join(sorted(names))}"
    others = f" There are {', '.join(sorted(names))}" if len(names) <= 20 else ""
    return f"; did you mean {close[0]}?{others}"
