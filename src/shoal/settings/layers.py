"""Where settings come from: what was given by hand, files, runs and presets, each made one nested tree with the same names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.errors import ConfigError
from shoal.imports import OPAQUE, nearest, object_path
from shoal.keys import Tree, check_keys
from shoal.settings.text import parsed, read_yaml
from shoal.urls import is_url, local_directory

PRESETS = Path(__file__).parents[1] / "presets"


@dataclass
class Layer:
    """One source of settings. `source` begins its messages."""

    source: str
    tree: Tree

    @classmethod
    def of(cls, source: str, tree: Mapping[str, Any]) -> Layer:
        """Dotted keys opened, dashes made underscores, import paths made whole."""
        nested = _nest(tree, source)
        for section, key in (("algorithm", "name"), ("policy", "network"), ("env", "id")):
            if isinstance(nested.get(section), dict) and key in nested[section]:
                nested[section][key] = _whole_path(nested[section][key])
        return cls(source, nested)

    @property
    def env(self) -> Tree:
        section = self.tree.setdefault("env", {})
        return section if isinstance(section, dict) else {}

    @property
    def algorithm(self) -> str | None:
        section = self.tree.get("algorithm")
        return str(section["name"]) if isinstance(section, dict) and section.get("name") else None

    def checked(self, algorithm: str) -> Tree:
        """The tree with every key known; texts brought towards their types. Raises ConfigError."""
        try:
            return check_keys(self.tree, algorithm, parsed)
        except ConfigError as error:
            raise error if self.source in ("given", "base") else ConfigError(f"{self.source}: {error}") from None


def _nest(tree: Mapping[str, Any], source: str) -> Tree:
    nested: Tree = {}
    for key, value in tree.items():
        if not isinstance(key, str):
            raise ConfigError(f"{source}: the key {key!r} is no text; keys are names such as `seed` or `algorithm`")
        head, _, rest = key.partition(".")
        head = head.replace("-", "_")
        if rest:
            value = {rest: value}
        if head == "env" and not isinstance(value, Mapping):
            value = {"id": value}
        if head == "algorithm" and not isinstance(value, Mapping):
            value = {"name": value}
        if isinstance(value, Mapping):
            inner = dict(value) if head == "kwargs" else _nest(value, source)
            value = merged(nested[head], inner) if isinstance(nested.get(head), dict) else inner
        nested[head] = value
    return nested


def merged(low: Mapping[str, Any], high: Mapping[str, Any]) -> Tree:
    tree = dict(low)
    for key, value in high.items():
        below = tree.get(key)
        tree[key] = merged(below, value) if isinstance(below, dict) and isinstance(value, Mapping) else value
    return tree


def _whole_path(value: Any) -> Any:
    """A callable's import path; a file's absolute path, so that a run can be resumed from any directory."""
    if callable(value):
        return object_path(value)
    if isinstance(value, str) and not value.startswith(OPAQUE) and (match := re.fullmatch(r"(.+\.py):([\w.]+)", value)):
        file = Path(match[1]).expanduser().resolve()
        if not file.is_file():
            raise ConfigError(f"{value}: there is no file {file}")
        return f"{file}:{match[2]}"
    return value


def read_target(target: str | Callable[..., Any] | None) -> tuple[str | None, Path | None]:
    """The environment's name, or the file that holds the configuration."""
    if target is None or not isinstance(target, str):
        return (None if target is None else object_path(target)), None
    path = Path(target).expanduser()
    if target.endswith((".yaml", ".yml")):
        return None, path
    if (path / "config.yaml").is_file():
        return None, path / "config.yaml"
    if target.endswith(".py"):
        raise ConfigError(f"{target} is a Python file; name the factory in it: {target}:make_env")
    return str(_whole_path(target)), None


def passed_back(file: Path) -> Tree:
    """A configuration file; where it is that of a run, the new run does not go into the same directory."""
    tree = read_yaml(file)
    named = str(tree.get("run_dir") or "")
    if named and (local_directory(named) if is_url(named) else Path(named).resolve()) == file.resolve().parent:
        del tree["run_dir"]
    return tree


def preset_names() -> list[str]:
    """Environments (or whole namespaces, such as ALE) that have a preset in the package."""
    return sorted(file.stem.replace("__", "/") for file in PRESETS.glob("*.yaml"))


def preset_words(preset: str, algorithm: str, asked: Any) -> str:
    """Which preset was taken, `none` or by name, and whether it has anything for this algorithm; asked: the key as it was given."""
    if preset == "none":
        return "no preset" if asked == "none" else "no preset for it"
    tuned = algorithm in load_preset("", preset)[1].get("algorithms", {})
    return f"preset {preset}" + ("" if tuned else f" (which has nothing for {algorithm} alone)")


def load_preset(env_id: str, asked: Any) -> tuple[str, Tree]:
    """The preset's name and tree: that of the environment, or of its namespace (ALE); `none` and nothing where there is none."""
    if asked is not None and asked not in ("none", *preset_names()):
        raise ConfigError(
            f"preset: there is no preset {asked!r}{nearest(str(asked), preset_names())}; there are {', '.join(preset_names())}, or none"
        )
    wanted = [asked] if asked is not None else [env_id, env_id.partition("/")[0]]
    for name in wanted:
        file = PRESETS / f"{name.replace('/', '__')}.yaml"
        if name in preset_names():
            return name, read_yaml(file)
    return "none", {}
