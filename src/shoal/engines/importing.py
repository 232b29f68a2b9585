"""Whether a machine can import what a run is made of: its environment, and a network and an algorithm of the user's own.

That is the user's code, which may hang or end its process: it is tried in one of its own (`import_main`), forked from a zygote.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from shoal.config import RunConfig
from shoal.engines.question import Answerer, Question
from shoal.errors import ConfigError, EnvironmentFault, ShoalError
from shoal.supervision.zygote import Zygote, wait_until_ready

if TYPE_CHECKING:
    from shoal.engines.roles import UserObjects
    from shoal.supervision.zygote_main import ChildContext

IMPORTING = "importing it"
_EVERY_RUNS = {"", "shoal", "torch", "numpy", "gymnasium"}  # whose packages are compared in any case


def try_imports(
    zygote: Zygote, environment: str, limit_seconds: float, log_directory: Path, ready_seconds: float | None = None
) -> tuple[list[str], str]:
    """The packages (distributions) that the run's own code needs, by name, and why it cannot be imported here; empty where it can.

    Waits for a process that imports; `limit_seconds`: an import that takes longer hangs, and is such a reason, as is a zygote that is lost meanwhile.
    `ready_seconds`: for a zygote that is not known to be ready yet.
    """
    try:
        if ready_seconds is not None:
            wait_until_ready(zygote, ready_seconds)
        answer = Question(zygote, environment, limit_seconds, log_directory).ask("shoal.engines.importing:import_main", "import")
    except EnvironmentFault as fault:  # it hung, or ended the process
        return [], str(fault).splitlines()[0]
    except ShoalError as error:
        first, *more = str(error).strip().splitlines()
        return [], f"{first} {more[-1]}" if more else first
    return [str(name) for name in answer["packages"]], str(answer["error"])


def import_main(context: ChildContext) -> int:
    """The process that imports. Answers {packages, error}."""
    from shoal.engines.beginning import user_objects

    answerer = Answerer(context.channel)
    answer: dict[str, Any] = {"packages": [], "error": ""}
    answerer.tell(IMPORTING)
    try:
        modules = import_all(RunConfig.model_validate(context.payload["config"]), user_objects(context))
        answer["packages"] = packages_of(modules)
    except ConfigError as error:
        answer["error"] = str(error)
    except BaseException as error:  # the user's objects raise what they like as they are unpickled
        answer["error"] = f"{type(error).__name__}: {error}"
    answerer.answer(answer)
    return 0


def import_all(config: RunConfig, objects: UserObjects) -> list[ModuleType]:
    """Import what the run is made of, and make nothing of it. Returns the modules in which it lies, without those of shoal.

    Raises:
      ConfigError: something cannot be imported; names the key and the path.
    """
    from shoal.algorithms import load_algorithm
    from shoal.environments.make import import_environment
    from shoal.imports import load_object

    found: list[ModuleType] = []
    own: list[Any] = [objects.env, objects.network, objects.algorithm]
    try:
        key = f"env.id {config.env.id}"
        if objects.env is None:
            found += import_environment(config.env)
        key = f"policy.network {config.policy.network}"
        if objects.network is None and config.policy.network is not None:
            own.append(load_object(config.policy.network))
        key = f"algorithm {config.algorithm.name}"
        if objects.algorithm is None:
            own.append(load_algorithm(config.algorithm.name))
    except ConfigError as error:
        raise error if str(error).startswith(key.split()[0]) else ConfigError(f"{key}: {error}") from error
    found += [sys.modules[name] for thing in own if (name := getattr(thing, "__module__", None)) in sys.modules]
    return [module for module in found if _top(module.__name__) != "shoal"]


def packages_of(modules: Iterable[ModuleType]) -> list[str]:
    """The distributions that these modules are of, and those that they import by name themselves; code that nobody installed is of none."""
    tops: set[str] = set()
    for module in modules:
        tops.add(_top(module.__name__))
        for value in vars(module).values():
            name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
            tops.add(_top(name) if isinstance(name, str) else "")
    tops -= sys.stdlib_module_names | _EVERY_RUNS
    by_module = metadata.packages_distributions() if tops else {}  # it reads the files of all that is installed
    return sorted({package for top in tops for package in by_module.get(top, ())})


def _top(name: str) -> str:
    return name.partition(".")[0]
