"""Settings as text: YAML files read and written, and values of a command line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from shoal.config import RunConfig
from shoal.errors import ConfigError
from shoal.keys import Tree


class Raw(str):
    """Text from a command line: where a key has no type of its own (`env.kwargs`), it is read as YAML; other strings are left alone."""


class _Loader(yaml.SafeLoader):
    """YAML as PyYAML reads it, except that 3e-4 is a number, and that a key may not come twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen and isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value} is given twice", key.start_mark)
            if isinstance(key, yaml.ScalarNode):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would take for a number."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789"))
for _digit in "0123456789":  # YAML 1.1 takes 1:8 for 68, in sixties
    _Loader.yaml_implicit_resolvers[_digit].insert(0, ("tag:yaml.org,2002:str", re.compile(r"^[0-9]+:[0-9]+$")))


def read_yaml(path: Path) -> Tree:
    """A configuration file as a tree. Raises ConfigError where it is missing, is no YAML, or is no mapping."""
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if tree is not None and not isinstance(tree, dict):
        raise ConfigError(f"{path} holds a {type(tree).__name__}; a configuration is a mapping such as `env: {{id: CartPole-v1}}`")
    return tree or {}


def dump_config(config: RunConfig) -> str:
    """YAML that `load_config` turns back into an equal configuration. Raises ConfigError where a value has no place in a file."""
    try:
        tree = config.model_dump(mode="json", by_alias=True)
    except ValueError as error:
        raise ConfigError(
            f"the configuration holds a value that cannot be written to a file (env.kwargs take plain values): {error}"
        ) from error
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def dump_tree(tree: Mapping[str, Any]) -> str:
    """Settings as YAML that `read_yaml` turns back into the same tree; all ASCII, so that it can stand inside other files."""
    return yaml.dump(dict(tree), Dumper=_Dumper, sort_keys=False, allow_unicode=False)


def parsed(value: Any) -> Any:
    """What a text from a command line says; anything else as it is."""
    if not isinstance(value, Raw):
        return value
    try:
        return yaml.load(value, _Loader)
    except yaml.YAMLError:
        return str(value)
