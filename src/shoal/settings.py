"""From what the user wrote to one complete `RunConfig`: layers, their order, and messages that say what was meant.

Lowest first: the defaults of the models, those that the algorithm has of other sections, the preset of a known environment, a YAML file, what was given by hand. Naming another
algorithm drops the keys of the one below it, and the mode that went with it; giving a stop condition drops those of the preset.
No torch here: the command line and the supervisor import this file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from shoal.config import BUILT_IN, CustomConfig, OffPolicyConfig, RayConfig, RunConfig, actor_bounds
from shoal.errors import ConfigError
from shoal.imports import OPAQUE, load_object, nearest, object_path
from shoal.keys import Tree, algorithm_model, check_keys, fault_lines, fields_by_key, section_of
from shoal.urls import check_url, is_url, local_directory

__all__ = [
    "Raw",
    "adapt_actors",
    "available_cores",
    "dump_config",
    "dump_tree",
    "file_settings",
    "load_config",
    "load_object",
    "nearest",
    "object_path",
    "preset_names",
    "read_yaml",
    "resolve",
]

PRESETS = Path(__file__).parent / "presets"
DEFAULT_GROUPS, DEFAULT_GROUP_SIZE = 4, 8
WAITING_ACTORS_PER_CORE = 8
NO_REPLAY_ON_NODES = "ray.learners_on: what learns from a replay keeps it beside its learners, on the driver's machine; leave it at driver, or take ppo, appo or impala"


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


def file_settings(file: Path) -> Tree:
    """What a configuration file says, nested, import paths made whole, without the directory of the run that it is of. Raises ConfigError."""
    return _Layer.of(str(file), _passed_back(file)).tree


def load_config(path: Path) -> RunConfig:
    """The configuration of a run, as `dump_config` wrote it. Raises ConfigError."""
    layer = _Layer.of(str(path), read_yaml(path))
    if not layer.env.get("id"):
        raise ConfigError(f"{path} names no environment (env.id): it is empty or damaged; the run's directory cannot be used without it")
    return _validated(layer.checked(layer.algorithm or "ppo"))


def available_cores() -> int:
    """Cores that this process may use: its affinity, and the container's quota where that is less."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):
        return cores


def preset_names() -> list[str]:
    """Environments (or whole namespaces, such as ALE) that have a preset in the package."""
    return sorted(file.stem.replace("__", "/") for file in PRESETS.glob("*.yaml"))


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
    env_id, file = _read_target(target)
    layers = [_Layer.of("base", base or {})]
    if file is not None:
        layers.append(_Layer.of(str(file), _passed_back(file)))
    given = _Layer.of("given", overrides or {})
    if env_id is not None:
        named = given.env.setdefault("id", env_id)
        if named != env_id:
            raise ConfigError(f"two environments are named, {env_id} and env.id {named}; give one")
    return _resolve([*layers, given])


@dataclass
class _Layer:
    """One source of settings. `source` begins its messages."""

    source: str
    tree: Tree

    @classmethod
    def of(cls, source: str, tree: Mapping[str, Any]) -> _Layer:
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
            return check_keys(self.tree, algorithm, _parse_raw)
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
            value = _merge(nested[head], inner) if isinstance(nested.get(head), dict) else inner
        nested[head] = value
    return nested


def _merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> Tree:
    merged = dict(low)
    for key, value in high.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, Mapping) else value
    return merged


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


def _parse_raw(value: Any) -> Any:
    if not isinstance(value, Raw):
        return value
    try:
        return yaml.load(value, _Loader)
    except yaml.YAMLError:
        return str(value)


def _read_target(target: str | Callable[..., Any] | None) -> tuple[str | None, Path | None]:
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


def _passed_back(file: Path) -> Tree:
    """A configuration file; where it is that of a run, the new run does not go into the same directory."""
    tree = read_yaml(file)
    named = str(tree.get("run_dir") or "")
    if named and (local_directory(named) if is_url(named) else Path(named).resolve()) == file.resolve().parent:
        del tree["run_dir"]
    return tree


def _load_preset(env_id: str, asked: Any) -> tuple[str, Tree]:
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


def _resolve(layers: list[_Layer]) -> tuple[RunConfig, str]:
    env_id = next((layer.env["id"] for layer in reversed(layers) if layer.env.get("id")), None)
    if not env_id:
        raise ConfigError("no environment: name one (`shoal train CartPole-v1`), or give env.id in the configuration")
    asked = next((layer.tree["preset"] for layer in reversed(layers) if layer.tree.get("preset")), None)
    name, shared = _load_preset(str(env_id), asked)
    by_algorithm = shared.pop("algorithms", {})
    preset = _Layer.of(f"preset {name}", shared)
    algorithm = next((layer.algorithm for layer in reversed([preset, *layers]) if layer.algorithm), "ppo")
    defaults = algorithm_model(algorithm).defaults
    preset.tree["algorithm"] = {"name": algorithm}
    preset.tree = _merge(_merge(defaults, preset.tree), _Layer.of(preset.source, by_algorithm.get(algorithm, {})).tree)
    running = _Layer.of("", shared).algorithm or "ppo"
    _replace_stop(preset, layers)
    tree = preset.checked(algorithm)
    for layer in layers:
        running = layer.algorithm or running
        checked = layer.checked(running if layer is not layers[-1] else algorithm)
        if running != algorithm:
            checked.pop("algorithm", None)
            checked.pop("mode", None)
        tree = _merge(tree, checked)
    asked_for = [layer.tree for layer in layers]
    return _complete(_validated({**tree, "preset": name}), asked_for, resumed=bool(layers[0].tree)), name


def _replace_stop(preset: _Layer, layers: list[_Layer]) -> None:
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


def _asked(trees: list[Tree], section: str, key: str) -> bool:
    """Whether a user gave this key (a preset or a default may be adapted, a wish may not)."""
    return any(isinstance(part := tree.get(section), dict) and part.get(key) is not None for tree in trees)


def _complete(config: RunConfig, asked_for: list[Tree], *, resumed: bool) -> RunConfig:
    """Fill what follows from other keys, and refuse what cannot go together. Raises ConfigError.

    asked_for: what the user gave, layer by layer; the last was given by hand. resumed: the first of them is the run's own configuration.
    """
    if is_url(config.run_dir):
        config.run_dir = check_url(config.run_dir)
    algorithm, sampling = config.algorithm, config.sampling
    own = isinstance(algorithm, CustomConfig)  # whose modes its class says, once torch is there (engines.mains.look)
    if config.mode is None and not own:
        config.mode = algorithm.modes[0]
    if config.mode is not None and not own and config.mode not in algorithm.modes:
        *others, last = [name for name, model in BUILT_IN.items() if config.mode in model.modes]
        raise ConfigError(
            f"mode: {algorithm.name} runs in {' or '.join(algorithm.modes)} mode, not {config.mode}; for {config.mode} take --algorithm {', '.join(others)} or {last}"
        )
    given = {key for key, value in (asked_for[-1].get("replay") or {}).items() if value is not None}
    if given and not own and not isinstance(algorithm, OffPolicyConfig):
        able = ", ".join(name for name, model in BUILT_IN.items() if issubclass(model, OffPolicyConfig))
        raise ConfigError(
            f"replay.{sorted(given)[0]} is for what learns from a replay ({able}), and this run's algorithm is {algorithm.name}"
        )
    sampling.groups = sampling.groups or DEFAULT_GROUPS
    sampling.group_size = sampling.group_size or DEFAULT_GROUP_SIZE
    _check_engine(config, asked_for, resumed)
    if config.actors is not None and config.actors > sampling.groups:
        raise ConfigError(_too_many_actors(config.actors, sampling.groups, sampling.group_size))
    if config.actors is None and config.engine == "local":
        config.actors = min(available_cores(), sampling.groups)
        if config.mode == "async":  # in sync mode actors and learners take turns
            config.actors = max(1, min(available_cores() + 1 - config.learners, sampling.groups))
            config.actors = max(config.actors, min(2, sampling.groups))
        config.model_fields_set.discard("actors")  # nobody asked for it
    if config.autoscale is not None:
        said = asked_for[-1:] if resumed else asked_for
        _fit_to_bounds(config, config.autoscale, any(tree.get("actors") is not None for tree in said))
    schedules = [key for key in ("learning_rate_schedule", "clip_range_schedule") if getattr(algorithm, key, "constant") == "linear"]
    if schedules and algorithm.schedule_env_steps is None:
        if config.stop.env_steps is None:
            raise ConfigError(
                f"algorithm.{schedules[0]} is linear, and nothing says where it ends: give algorithm.schedule_env_steps or stop.env_steps"
            )
        algorithm.schedule_env_steps = config.stop.env_steps
    if config.mode == "sync" and not resumed:
        _refuse_async_keys(config, asked_for)
    if not own and not resumed:
        _fit_minibatch(config, _asked(asked_for, "algorithm", "minibatch_size"))
    return config


def _too_many_actors(actors: int, groups: int, group_size: int) -> str:
    """What to give instead. Groups do not follow the number of actors, on which no weights may depend."""
    size, rest = divmod(groups * group_size, actors)
    same = "" if rest else f" --sampling.group-size {size} (as many environments as now)"
    return f"actors: {actors} processes cannot share {groups} groups; give --actors {groups} or less, or --sampling.groups {actors}{same}"


def _check_engine(config: RunConfig, asked_for: list[Tree], resumed: bool) -> None:
    """Raise ConfigError for what the engine that was asked for does not take. A run that goes on without its cluster forgets where that was."""
    if config.engine == "local":
        asked = asked_for[-1:] if resumed else asked_for
        given = [key for key in ("address", "nodes", "actors_per_node") if _asked(asked, "ray", key)]
        given += ["learners_on" for tree in asked if (tree.get("ray") or {}).get("learners_on") == "nodes"]  # driver is so here too
        if given:
            raise ConfigError(f"ray.{given[0]} says where on a cluster a run is placed: give --engine ray with it")
        config.ray = RayConfig()
        return
    if config.actors is not None and not resumed:
        raise ConfigError("actors: on a cluster they are counted by node; give --actors-per-node")
    if config.policy.inference == "server":
        raise ConfigError("policy.inference: on a cluster every actor has a policy of its own (actor); a server has no way to it")
    if config.ray.learners_on == "nodes" and config.learners == 1:
        raise ConfigError("ray.learners_on: a single learner is where the command runs; give --learners N with it, or leave it at driver")
    if config.ray.learners_on == "nodes" and isinstance(config.algorithm, OffPolicyConfig):
        raise ConfigError(NO_REPLAY_ON_NODES)
    config.policy.inference, config.actors = "actor", None


def _fit_to_bounds(config: RunConfig, bounds: str, wanted: bool) -> None:
    """A run that follows the load begins between its bounds; wanted: somebody said with how many actors. Raises ConfigError."""
    (least, most), groups = actor_bounds(bounds), config.sampling.groups or 1
    if most > groups:
        raise ConfigError(
            f"autoscale: {most} processes cannot share {groups} groups; give --autoscale {min(least, groups)}:{groups} or less, or --sampling.groups {most}"
        )
    if config.actors is None:
        return
    if wanted and not least <= config.actors <= most:
        outside = "runs all roles in one process" if config.actors == 0 else f"is outside of --autoscale {bounds}"
        raise ConfigError(
            f"actors: {config.actors} {outside}; it says with how many actors a run begins: give one from {least} to {most}, or --autoscale none"
        )
    asked = "actors" in config.model_fields_set
    config.actors = min(max(config.actors, least), most)
    if not asked:
        config.model_fields_set.discard("actors")


def adapt_actors(config: RunConfig) -> bool:
    """Once its form is known: environments that wait leave the cores idle, and a process steps one group at a time, so each group gets a process
    of its own, up to `WAITING_ACTORS_PER_CORE`, unless somebody asked for another number. Returns whether that changed it."""
    if config.env.form != "threads" or "actors" in config.model_fields_set or config.engine != "local":
        return False
    before = config.actors
    most = config.sampling.groups or 1 if config.autoscale is None else actor_bounds(config.autoscale)[1]
    config.actors = max(before or 0, min(most, WAITING_ACTORS_PER_CORE * available_cores()))
    return config.actors != before


def _refuse_async_keys(config: RunConfig, asked_for: list[Tree]) -> None:
    """What a user asked for is refused; what a preset says of async mode does not count in sync mode."""
    wanted = (("sampling.batch_rollouts", _asked(asked_for, "sampling", "batch_rollouts")),
              ("max_policy_lag", asked_for[-1].get("max_policy_lag") is not None))  # fmt: skip
    config.sampling.batch_rollouts = None
    other = "" if "async" in config.algorithm.modes else " with --algorithm appo or impala"
    for key, given in wanted:
        if given:
            raise ConfigError(
                f"{key} belongs to async mode, and this run is sync: an update takes one rollout of each of the {config.sampling.groups} groups, "
                f"without lag; leave it out, or take --mode async{other}"
            )


def _fit_minibatch(config: RunConfig, wanted: bool) -> None:
    """A minibatch is no longer than the batch of an update: refused where the user asked for it, else cut."""
    sampling, size = config.sampling, getattr(config.algorithm, "minibatch_size", None)
    rollouts = sampling.batch_rollouts or sampling.groups or 1
    batch = rollouts * (sampling.group_size or 1) * sampling.rollout_length
    if size is None or size <= batch:
        return
    if wanted:
        raise ConfigError(
            f"algorithm.minibatch_size: {size} is more than the {batch} env steps of an update ({rollouts} rollouts of {sampling.group_size} environments "
            f"and {sampling.rollout_length} steps); lower it, or raise sampling.groups, sampling.group_size or sampling.rollout_length"
        )
    config.algorithm.minibatch_size = batch  # type: ignore[attr-defined]
