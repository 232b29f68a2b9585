"""From a configuration to environments: Gymnasium ids, `module:factory`, `file.py:factory`, Atari ids, or a callable."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from contextlib import suppress
from types import ModuleType
from typing import Any

from shoal.config import EnvConfig
from shoal.environments.faults import environment_errors, environment_fault, raised_in
from shoal.environments.group import Progress, PythonGroup, nobody_waits
from shoal.environments.instance import offered_snapshot_bytes, unwrap
from shoal.environments.spaces import MASK, describe
from shoal.errors import ConfigError, ShoalError
from shoal.imports import OPAQUE, load_object
from shoal.types import EnvironmentGroup, EnvironmentSpec

Factory = Callable[..., Any]

# What environments need, by the beginning of their entry point, and the extra that brings it.
_NEEDS = (
    ("gymnasium.envs.mujoco", ("mujoco",), "mujoco"),
    ("gymnasium.envs.box2d", ("Box2D",), "box2d"),
    ("ale_py", ("cv2",), "atari"),
)
# Which extra brings a module that an environment asks for.
_EXTRAS = {"ale_py": "atari", "cv2": "atari", "Box2D": "box2d", "pygame": "box2d", "mujoco": "mujoco", "imageio": "mujoco"}


def environment_factory(
    env: EnvConfig, callable_: Factory | None = None, *, training: bool = True, render_mode: str | None = None
) -> Callable[[], Any]:
    """A function without arguments that makes one environment.

    Args:
      callable_: the user's own factory, called with `env.kwargs`; `env.id` is then only its name.
      training: False leaves out what only training wants (Atari: life loss ends an episode, signs of rewards).
      render_mode: passed on where the environment takes one.
    Raises:
      ConfigError: unknown id (with the nearest names), missing extra (with the command that installs it), no such factory.
        Wrong `env.kwargs` raise it when the environment is made.
    """
    if callable_ is None and (is_path(env.id) or env.id.startswith(OPAQUE)):
        callable_ = load_object(env.id)
    if callable_ is not None:
        return explained(env, _user_factory(env, callable_, render_mode))
    spec = registered(env.id)
    if is_atari(spec) and env.atari_preprocessing:
        from shoal.environments.atari import atari_factory

        return explained(env, atari_factory(spec, env, training=training, render_mode=render_mode))
    return explained(env, _gymnasium_factory(env, spec, render_mode))


def is_path(env_id: str) -> bool:
    """True for `file.py:factory` and `package.module:factory`; False for ids, such as `module:Env-v0`, which imports and looks up."""
    location, colon, name = env_id.rpartition(":")
    return bool(colon and location) and all(part.isidentifier() for part in name.split("."))


def registered(env_id: str) -> Any:
    """Gymnasium's registration of an id.

    Raises:
      ConfigError: none, with the nearest names; or the package that would register it is not installed.
    """
    import gymnasium

    missing_atari = not _register_atari()
    if not env_id:
        raise ConfigError("env.id is empty; give a Gymnasium id such as CartPole-v1, package.module:factory or file.py:factory")
    module, colon, name = env_id.rpartition(":")
    if colon:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ConfigError(f"env.id {env_id}: cannot import {module}: {error}") from error
    if missing_atari and (name.startswith("ALE/") or "NoFrameskip" in name):
        raise ConfigError(f"env.id {env_id} needs the Atari emulator: pip install 'shoal[atari]'")
    try:
        return gymnasium.spec(name)
    except gymnasium.error.Error as error:
        raise ConfigError(
            f"env.id {env_id!r} is no registered environment{_nearest(name, list(gymnasium.registry))}. {_first_line(error)}"
        ) from None


def check_registered(env: EnvConfig) -> None:
    """What can be said of an environment from its id alone, without making it and without torch.

    Raises:
      ConfigError: no such id, with the nearest; or what it needs is not installed, with the command that installs it.
    """
    if not env.id or ":" in env.id:
        return  # code of the user's own: it runs in the roles' processes only
    spec = registered(env.id)
    entry = spec.entry_point if isinstance(spec.entry_point, str) else ""
    for prefix, modules, extra in _NEEDS:
        if entry.startswith(prefix):
            for module in modules if prefix != "ale_py" or env.atari_preprocessing else ():
                if not _installed(module):
                    raise ConfigError(f"env.id {env.id} needs {module}, which is not installed: pip install 'shoal[{extra}]'")


def import_environment(env: EnvConfig) -> list[ModuleType]:
    """Import what an environment is made of, and make none. Returns the modules in which it lies.

    Raises:
      ConfigError: as `environment_factory`; or what it needs cannot be imported.
    """
    if is_path(env.id) or env.id.startswith(OPAQUE):
        name = getattr(load_object(env.id), "__module__", None)
        return [sys.modules[name]] if name in sys.modules else []
    check_registered(env)
    spec = registered(env.id)
    entry = spec.vector_entry_point if env.form == "native" else spec.entry_point
    names = [entry.partition(":")[0]] if isinstance(entry, str) else []
    for prefix, modules, _ in _NEEDS:
        names += modules if names and names[0].startswith(prefix) else ()
    try:
        return [importlib.import_module(name) for name in names]
    except Exception as error:  # whoever registered it may raise anything
        raise ConfigError(f"env.id {env.id}: importing it raised {type(error).__name__}: {_first_line(error)}") from error


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _register_atari() -> bool:
    try:
        import ale_py
        import gymnasium
    except ImportError:
        return False
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # before the first emulator, which prints a banner
    if "ALE/Pong-v5" not in gymnasium.registry:
        gymnasium.register_envs(ale_py)
    return True


def is_atari(spec: Any) -> bool:
    return isinstance(spec.entry_point, str) and spec.entry_point.startswith("ale_py")


def _nearest(name: str, known: list[str]) -> str:
    lower = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.6)
    if close:
        return f" (did you mean {', '.join(lower[c] for c in close)}?)"
    return " of Gymnasium; one of a package of yours is package:NAME, your own code package.module:factory or file.py:factory"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _gymnasium_factory(env: EnvConfig, spec: Any, render_mode: str | None) -> Callable[[], Any]:
    import gymnasium

    kwargs = dict(env.kwargs)
    if render_mode is not None:
        kwargs["render_mode"] = render_mode
    if env.max_episode_steps is not None:
        kwargs["max_episode_steps"] = env.max_episode_steps
    if spec.entry_point is None:
        raise ConfigError(f"env.id {env.id} has only a vector form; set env.form to native")
    return lambda: gymnasium.make(spec, disable_env_checker=True, **kwargs)


def _user_factory(env: EnvConfig, factory: Factory, render_mode: str | None) -> Callable[[], Any]:
    if not callable(factory):
        raise ConfigError(f"env.id {env.id} is {type(factory).__name__}, but a function or class that makes a gymnasium.Env was expected")
    kwargs = dict(env.kwargs)
    if render_mode is not None and _accepts(factory, "render_mode"):
        kwargs["render_mode"] = render_mode

    def create() -> Any:
        from gymnasium.wrappers import TimeLimit

        made = factory(**kwargs)
        return made if env.max_episode_steps is None else TimeLimit(made, env.max_episode_steps)

    return create


def _accepts(factory: Factory, name: str) -> bool:
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(p.name == name or p.kind is p.VAR_KEYWORD for p in parameters)


def explained(env: EnvConfig, create: Callable[[], Any]) -> Callable[[], Any]:
    """`create`, with errors that the configuration explains turned into ConfigError."""

    def create_checked() -> Any:
        try:
            return create()
        except TypeError as error:
            if _is_about_arguments(error, env.kwargs):
                raise ConfigError(f"env.kwargs of {env.id}: {_first_line(error)}") from error
            raise
        except ImportError as error:  # gymnasium's DependencyNotInstalled is none of these; see below
            raise _not_installed(env, error) or error from error
        except Exception as error:
            if type(error).__name__ == "DependencyNotInstalled":
                raise _not_installed(env, error) or ConfigError(f"env.id {env.id}: {error}") from error
            raise

    return create_checked


def _is_about_arguments(error: TypeError, kwargs: dict[str, Any]) -> bool:
    """Whether the factory did not take `kwargs`, or asks for more."""
    message = str(error)
    return ("unexpected keyword" in message and any(f"'{key}'" in message for key in kwargs)) or "required positional argument" in message


def _not_installed(env: EnvConfig, error: BaseException) -> ConfigError | None:
    seen: BaseException | None = error
    while seen is not None:
        name = getattr(seen, "name", None) or ""
        extra = next((e for module, e in _EXTRAS.items() if module == name.split(".")[0] or module.lower() in str(seen).lower()), None)
        if extra:
            return ConfigError(f"env.id {env.id} needs a package that is not installed: pip install 'shoal[{extra}]'")
        seen = seen.__cause__ or seen.__context__
    return None


def environment_spec(env: EnvConfig, factory: Factory | None = None) -> EnvironmentSpec:
    """What the rest of the house knows of the environment: makes one, resets it once with seed 0, and closes it.

    Raises:
      ConfigError, EnvironmentFault: as `open_environment` and `describe_instance`.
    """
    made = open_environment(env, factory)
    try:
        return describe_instance(env.id, made)
    finally:
        close_quietly(made)


def open_environment(env: EnvConfig, factory: Factory | None = None, *, training: bool = True) -> Any:
    """One environment; what its own code raises is an EnvironmentFault, what the configuration explains a ConfigError."""
    try:
        return environment_factory(env, factory, training=training)()
    except ShoalError:
        raise
    except environment_errors() as error:
        said = raised_in("making the environment", error)
        raise environment_fault(**said, environment=env.id, group=0, env=0, step=0, seed=0) from error


def close_quietly(made: Any) -> None:
    """Close an environment that is no longer wanted; what it raises then is of no interest."""
    with suppress(*environment_errors()):
        made.close()


def describe_instance(name: str, made: Any) -> EnvironmentSpec:
    """The spec of an environment that exists; it is reset with seed 0, to see whether `info` holds an action mask.

    Raises:
      ConfigError: spaces that shoal does not take. EnvironmentFault: `reset` raised.
    """
    bare, _ = unwrap(made)
    try:
        result = bare.reset(seed=0)
    except environment_errors() as error:
        raise environment_fault(**raised_in("reset()", error), environment=name, group=0, env=0, step=0, seed=0) from error
    info = result[1] if isinstance(result, tuple) and len(result) == 2 else {}
    mask_in_info = isinstance(info, dict) and MASK in info
    return describe(name, bare.observation_space, bare.action_space, mask_in_info=mask_in_info, snapshot_bytes=offered_snapshot_bytes(bare))


def make_group(
    env: EnvConfig,
    group: int,
    num_envs: int,
    run_seed: int,
    factory: Factory | None = None,
    *,
    epoch: int = 0,
    spec: EnvironmentSpec | None = None,
    progress: Progress = nobody_waits,
) -> EnvironmentGroup:
    """One environment group in the form that `env.form` names; `auto` is the python form (see `probe.choose_form`, which measures).

    Args:
      factory: the user's own callable, as in `environment_factory`.
      epoch: raised by a roll-back after divergence; part of every episode's seed.
      spec: as `probe` found it; without it one more environment is made to find out.
      progress: told of each call but those of `step` (of the native form: of environment 0, for all). In the threads form, with -1 a few times a
        second while the group is restored, for as long as no call has taken env.step_timeout_seconds: then that is raised as a fault.
    """
    if env.form == "native":
        from shoal.environments.native import make_native_group

        return make_native_group(env, group, num_envs, run_seed, factory, epoch=epoch, progress=progress)
    create = environment_factory(env, factory)
    spec = spec or environment_spec(env, factory)
    if env.form == "threads":
        from shoal.environments.threads import PacedGroup

        made: PythonGroup = PacedGroup(create, spec, group, num_envs, run_seed, epoch, env.step_timeout_seconds)
    else:
        made = PythonGroup(create, spec, group, num_envs, run_seed, epoch)
    made.progress = progress
    return made
