"""Layers put together, lowest first, and every value checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from shoal.config import RunConfig
from shoal.errors import ConfigError
from shoal.keys import Tree, algorithm_model, fault_lines, fields_by_key, section_of
from shoal.settings.completing import complete
from shoal.settings.layers import Layer, load_preset, merged, passed_back, read_target
from shoal.settings.text import read_yaml


def file_settings(file: Path) -> Tree:
    """What a configuration file says, nested, import paths made whole, without the directory of the run that it is of. Raises ConfigError."""
    return Layer.of(str(file), passed_back(file)).tree


def load_config(path: Path) -> RunConfig:
    """The configuration of a run, as `dump_config` wrote it. Raises ConfigError."""
    layer = Layer.of(str(path), read_yaml(path))
    if not layer.env.get("id"):
        raise ConfigError(f"{path} names no environment (env.id): it is empty or damaged; the run's directory cannot be used without it")
    return _validated(layer.checked(layer.algorithm or "ppo"))


def resolve(
    target: str | Callable[..., Any] | None, overrides: Mapping[str, Any] | None = None, base: Mapping[str, Any] | None = None
) -> tuple[RunConfig, str]:
    """One complete configuration, and the name of the preset that was taken (`none`).

    Args:
      target: an environment (Gymnasium id, `package.module:factory`, `file.py:factory`, a callable), a YAML file, a run's directory, or
        None where `base` or `overrides` name the environment.
      overrides: highest layer. Nested, or with dotted keys (`{"algorithm.learning_rate": 3e-4}`); values typed or text; `algorithm` may be a
        name, and a class or callable stands for its import path.
      base: a configuration tree of the rank of a YAML file, below it (a run's own configuration, on resuming).
    Raises:
      ConfigError: names the dotted key, what is allowed, what came, and the nearest name.
    """
    env_id, file = read_target(target)
    layers = [Layer.of("base", base or {})]
    if file is not None:
        layers.append(Layer.of(str(file), passed_back(file)))
    given = Layer.of("given", overrides or {})
    if env_id is not None:
        named = given.env.setdefault("id", env_id)
        if named != env_id:
            raise ConfigError(f"two environments are named, {env_id} and env.id {named}; give one")
    return _resolve([*layers, given])


def _resolve(layers: list[Layer]) -> tuple[RunConfig, str]:
    env_id = next((layer.env["id"] for layer in reversed(layers) if layer.env.get("id")), None)
    if not env_id:
        raise ConfigError("no environment: name one (`shoal train CartPole-v1`), or give env.id in the configuration")
    asked = next((layer.tree["preset"] for layer in reversed(layers) if layer.tree.get("preset")), None)
    name, shared = load_preset(str(env_id), asked)
    by_algorithm = shared.pop("algorithms", {})
    preset = Layer.of(f"preset {name}", shared)
    algorithm = next((layer.algorithm for layer in reversed([preset, *layers]) if layer.algorithm), "ppo")
    defaults = algorithm_model(algorithm).defaults
    preset.tree["algorithm"] = {"name": algorithm}
    preset.tree = merged(merged(defaults, preset.tree), Layer.of(preset.source, by_algorithm.get(algorithm, {})).tree)
    running = Layer.of("", shared).algorithm or "ppo"
    _replace_stop(preset, layers)
    tree = preset.checked(algorithm)
    for layer in layers:
        running = layer.algorithm or running
        checked = layer.checked(running if layer is not layers[-1] else algorithm)
        if running != algorithm:
            checked.pop("algorithm", None)
            checked.pop("mode", None)
        tree = merged(tree, checked)
    asked_for = [*(layer.tree for layer in layers[:-1]), checked]  # by hand with types: `none` asks for nothing
    return complete(_validated({**tree, "preset": name}), asked_for, resumed=bool(layers[0].tree)), name


def _replace_stop(preset: Layer, layers: list[Layer]) -> None:
    """Where the user says when to stop, the preset's conditions go; its number of steps stays as the length of schedules."""
    stop = preset.tree.get("stop", {})
    parts = [part for layer in layers if isinstance(part := layer.tree.get("stop"), dict)]  # anything else is refused with its layer
    given = {key for part in parts for key, value in part.items() if value is not None}
    if given:
        preset.tree.pop("stop", None)
    if given and "env_steps" not in given and "env_steps" in stop:
        preset.tree["algorithm"].setdefault("schedule_env_steps", stop["env_steps"])


def _validated(tree: Tree) -> RunConfig:
    """The models' own checks, with every fault of every section in one message."""
    faults: list[str] = []
    values: dict[str, Any] = {}
    for key, info in fields_by_key(RunConfig).items():
        section = section_of(info)
        if section is None or key not in tree:
            continue
        if key == "algorithm":
            section = algorithm_model(str(tree[key].get("name", "ppo")))
        values[key] = _validate_part(section, tree[key], f"{key}.", faults)
    plain = {key: value for key, value in tree.items() if key not in values}
    _validate_part(RunConfig, plain, "", faults)
    if faults:
        raise ConfigError("\n".join(faults))
    return RunConfig.model_validate({**plain, **values})


def _validate_part(model: type[BaseModel], tree: Tree, prefix: str, faults: list[str]) -> BaseModel | None:
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        faults += fault_lines(error, model, prefix)
    return None
