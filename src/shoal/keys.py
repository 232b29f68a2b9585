"""The dotted keys of the configuration: which there are, what each takes, and texts brought to a key's type.

The models in `shoal.config` are the one source; validation of keys, the command line's options and its help all walk them here.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined

from shoal.config import BUILT_IN, AlgorithmConfig, CustomConfig, RunConfig
from shoal.errors import ConfigError
from shoal.imports import nearest

Tree = dict[str, Any]


@dataclass(frozen=True)
class Key:
    """One key: its dotted name (`stop.return`), what it takes in words, its default as text, and its description."""

    name: str
    takes: str
    default: str
    description: str


def fields_by_key(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Fields under the names that users write (`return`, where the attribute is `return_`)."""
    return {info.alias or name: info for name, info in model.model_fields.items()}


def algorithm_model(name: str) -> type[AlgorithmConfig]:
    """The model of a built-in algorithm, or the open one for the user's own. Raises ConfigError for a name that is neither."""
    if name not in BUILT_IN and ":" not in name:
        raise ConfigError(
            f"algorithm: {name!r} is unknown{nearest(name, BUILT_IN)}; there are {', '.join(BUILT_IN)}, or an import path such as file.py:MyAlgorithm"
        )
    return BUILT_IN.get(name, CustomConfig)


def section_of(info: FieldInfo) -> type[BaseModel] | None:
    """The model of a field that is a section of its own."""
    for choice in _choices(info.annotation):
        if isinstance(choice, type) and issubclass(choice, BaseModel):
            return choice
    return None


def all_keys(algorithm: str = "ppo") -> list[Key]:
    """Every dotted key of a run with this algorithm, in the order of the models."""
    return list(_walk_keys(RunConfig, "", algorithm))


def _walk_keys(model: type[BaseModel], prefix: str, algorithm: str) -> Iterator[Key]:
    for name, info in fields_by_key(model).items():
        section = section_of(info)
        if section is AlgorithmConfig:
            section = algorithm_model(algorithm)
        if section is not None:
            yield from _walk_keys(section, f"{prefix}{name}.", algorithm)
        elif prefix + name != "algorithm.name":
            yield Key(prefix + name, takes(info), _default_text(info), info.description or "")


def takes(info: FieldInfo) -> str:
    """What a field takes, in words: `int > 0`, `sync|async`, `int,int,...`."""
    words = [text for choice in _choices(info.annotation) if (text := _type_words(choice))]
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    nested = [item for arg in get_args(info.annotation) for item in getattr(arg, "__metadata__", ())]
    marks = [mark for item in (*info.metadata, *nested) for mark in (getattr(item, "metadata", None) or [item])]
    bounds = [
        f"{sign} {getattr(mark, attribute)}"
        for mark in marks
        for attribute, sign in signs.items()
        if getattr(mark, attribute, None) is not None
    ]
    if any("," in word for word in words):
        bounds = []
    return " ".join(["|".join(words), " and ".join(bounds)]).strip()


def _type_words(choice: Any) -> str:
    origin = get_origin(choice)
    if origin is Literal:
        return "|".join(map(str, get_args(choice)))
    if origin is list:
        return "{0},{0},...".format(_type_words(next(iter(_choices(get_args(choice)[0])))))
    if origin is dict or choice is Any:
        return "value"
    return "" if choice is types.NoneType else {"str": "text", "float": "number"}.get(choice.__name__, choice.__name__)


def _default_text(info: FieldInfo) -> str:
    default = info.default_factory() if info.default_factory else info.default  # type: ignore[call-arg]
    if default is None or default is PydanticUndefined or default in ("", {}):
        return ""
    return ",".join(map(str, default)) if isinstance(default, list) else str(default).lower() if isinstance(default, bool) else str(default)


def check_keys(tree: Mapping[str, Any], algorithm: str, parse: Any) -> Tree:
    """A copy of the tree with every key known and every text brought towards its key's type.

    `parse(value)` reads values that have no type of their own (`env.kwargs`). Raises ConfigError for an unknown key, with the nearest.
    """
    return _check(RunConfig, tree, "", algorithm, parse)


def _check(model: type[BaseModel], tree: Mapping[str, Any], prefix: str, algorithm: str, parse: Any) -> Tree:
    fields = fields_by_key(model)
    checked: Tree = {}
    for key, value in tree.items():
        if key not in fields:
            if model.model_config.get("extra") != "allow":
                raise ConfigError(_unknown(key, prefix, fields, algorithm))
            checked[key] = parse(value)
            continue
        section = section_of(fields[key])
        if section is AlgorithmConfig:
            section = algorithm_model(algorithm)
        if section is None:
            checked[key] = {name: parse(item) for name, item in value.items()} if isinstance(value, Mapping) else coerce(value, fields[key])
        elif isinstance(value, Mapping):
            checked[key] = _check(section, value, f"{prefix}{key}.", algorithm, parse)
        elif value is not None:
            raise ConfigError(
                f"{prefix}{key} is a section, not a value: write {prefix}{key}.{next(iter(fields_by_key(section)))} and the like, not {value!r}"
            )
    return checked


def _unknown(key: str, prefix: str, fields: Mapping[str, FieldInfo], algorithm: str) -> str:
    if prefix == "algorithm.":
        owners = [name for name, model in BUILT_IN.items() if key in model.model_fields]
        if owners:
            return f"{prefix}{key} belongs to {' and '.join(owners)}; this run's algorithm is {algorithm}"
    everywhere = [known.name for known in all_keys(algorithm if algorithm in BUILT_IN else "ppo")]
    same_ending = [name for name in everywhere if name.rpartition(".")[2] == key]
    hint = f" (did you mean {same_ending[0]}?)" if same_ending else ""
    hint = hint or nearest(prefix + key, [prefix + name for name in fields]) or nearest(prefix + key, everywhere)
    where = f"{prefix.rstrip('.')} has" if prefix else "there are"
    return f"{prefix}{key} is no key of the configuration{hint}; {where} {', '.join(fields)}"


def fault_lines(error: ValidationError, model: type[BaseModel], prefix: str) -> list[str]:
    """What pydantic found wrong with a section, a line each: the dotted key, what it takes, what came, and the nearest name. What concerns several keys
    at once (a model's own check) is said of the section.

    prefix: of the section's keys, such as `algorithm.`.
    """
    return [_fault_line(fault, model, prefix) for fault in error.errors(include_url=False)]


def _fault_line(fault: ErrorDetails, model: type[BaseModel], prefix: str) -> str:
    location = ".".join(str(part) for part in fault["loc"] if not str(part).startswith("list["))
    kind, message = fault["type"], _expected(fault["type"], fault["msg"])
    if not location:
        return f"{prefix.rstrip('.')}: {message}" if prefix else message
    came = fault["input"]
    options = re.findall(r"'([^']+)'", message) if kind == "literal_error" else []
    hint = nearest(came, options) if isinstance(came, str) else ""
    got = "" if kind == "missing" else f", got {came!r}{hint}"
    info = fields_by_key(model).get(str(fault["loc"][0]))
    meaning = f"  [{info.description}]" if info is not None and info.description else ""
    return f"{prefix}{location}: {message}{got}{meaning}"


_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "dict": "a mapping", "list": "a list", "string": "text"}


def _expected(fault: str, message: str) -> str:
    """What a value should be, from pydantic's name of a fault and its message."""
    if fault == "missing":
        return "is to be given, since it has no default"
    kind, _, how = fault.partition("_")
    if how in ("type", "parsing", "from_float") and kind in _KINDS:
        return f"should be {_KINDS[kind]}"
    return message.removeprefix("Value error, ").replace("Input should be", "should be")


def coerce(value: Any, info: FieldInfo) -> Any:
    """Text brought towards a field's type, as far as pydantic does not do it: lists, `none`, and whole numbers such as 1e6."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    choices = list(_choices(info.annotation))
    if types.NoneType in choices and str not in choices and text.lower() in ("none", "null", ""):
        return None
    if any(get_origin(choice) is list for choice in choices):
        return [part.strip() for part in text.strip("[]()").split(",") if part.strip()]
    if int in choices and "e" in text.lower():
        try:
            number = float(text)
        except ValueError:
            return value
        return int(number) if number.is_integer() else value
    return str(value)


def _choices(annotation: Any) -> Iterator[Any]:
    """The members of a union, with Annotated taken off."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _choices(get_args(annotation)[0])
    elif origin in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from _choices(member)
    elif isinstance(annotation, type) and hasattr(annotation, "__value__"):
        yield from _choices(annotation.__value__)
    else:
        yield annotation
