"""Train, resume, load, evaluate, check: what `import shoal` offers, and what the command line calls.

The calling process is the supervisor; it imports torch only where all roles are to run in it (`actors: 0`).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.config import RunConfig
from shoal.errors import RunError
from shoal.monitoring.live import SilentView, View
from shoal.monitoring.recorder import Callback
from shoal.runs import find_run, new_run, old_run, read_result
from shoal.settings import load_config, resolve
from shoal.training.execution import execute
from shoal.training.facts import known_facts
from shoal.training.given import check_callbacks, pickled, split_objects
from shoal.training.playing import play
from shoal.training.resuming import is_over, refuse_changes
from shoal.urls import is_url

if TYPE_CHECKING:
    from shoal.environments.findings import CheckReport
    from shoal.evaluation import LoadedPolicy


@dataclass(frozen=True)
class Run:
    """A training that was made.

    Attributes:
      path: its directory; of a run in a store, the working copy of this machine, or what `load` could fetch.
      result: how its last part ended (the keys of `shoal train --json`); empty if it never ended by itself.
    """

    path: Path
    result: Mapping[str, Any]
    objects: Mapping[str, Any]

    def __fspath__(self) -> str:
        """A run stands for its directory, wherever one is asked for."""
        return str(self.path)

    def policy(self) -> LoadedPolicy:
        """The policy of the newest whole checkpoint."""
        from shoal.evaluation import load_policy

        return load_policy(self.path, network=self.objects.get("network"), environment=self.objects.get("env"))

    def evaluate(self, episodes: int = 100, seed: int = 0) -> dict[str, Any]:
        """See `shoal.evaluate`."""
        return evaluate(self, episodes=episodes, seed=seed)

    @property
    def config(self) -> RunConfig:
        """Complete and resolved, as it was when its last part began. Raises ConfigError where the file was damaged since."""
        return load_config(self.path / "config.yaml")


def train(
    target: str | Callable[..., Any] | None = None,
    *,
    callbacks: Sequence[Callback] = (),
    progress: View | None = None,
    profile: bool = False,
    **settings: Any,
) -> Run:
    """Train on an environment until a stop condition is met.

    Args:
      target: Gymnasium id, `package.module:factory`, `file.py:factory`, Atari id, a callable that returns a gymnasium.Env, a YAML file or a
        run's directory.
      callbacks: each is called after every update with a mapping (update, env_steps, seconds, mean_return, episodes, the algorithm's
        metrics), in this process; one that returns False ends the run.
      progress: a view (shoal.monitoring.live); a line or panel on standard error by default.
      profile: write `profile.json` into the run's directory: what every process did when, for Perfetto.
      settings: keys of the configuration, nested or dotted: algorithm="ppo", stop={"return": 475}, **{"sampling.groups": 8}. The environment,
        policy["network"] and algorithm may be objects: they travel to the roles by value.
    Raises:
      ConfigError, EnvironmentFault, DivergedError, ProcessError: see shoal.errors.
    """
    objects, target_path, settings = split_objects(target, settings)
    config, preset = resolve(target_path, settings)
    config.preset = preset
    check_callbacks(callbacks)
    with new_run(config) as run:
        result = execute(config, objects, run.directory, callbacks, progress, profile, run.discard, run.elsewhere)
        return Run(run.directory, result, objects)


def resume(
    path: str | os.PathLike[str],
    *,
    env: Callable[..., Any] | None = None,
    callbacks: Sequence[Callback] = (),
    progress: View | None = None,
    profile: bool = False,
    take_over: bool = False,
    **settings: Any,
) -> Run:
    """Go on with a run from its newest whole checkpoint. `settings` may change how it ends and how many actors it has.

    A run without a checkpoint begins again from the start, with a warning; one that met its stop condition is given back as it is.

    Args:
      path: of the run, or its URL in a store.
      env: the environment's factory, where the run was started with an object that has no import path.
      take_over: of a run in a store: also where its lock says that another driver is alive, because you know that it is not.
    Raises:
      RunError: no such run, or it is alive. CheckpointError: it has checkpoints, and none is whole. ConfigError: a setting that cannot change.
    """
    check_callbacks(callbacks)
    objects, _, settings = split_objects(env, settings)
    if isinstance(path, Run):
        objects = {**path.objects, **objects}

    def takes_replay(directory: Path) -> bool:
        return _gone_on_with(load_config(directory / "config.yaml"), settings, str(directory)).checkpoint.replay

    with old_run(path, take_over=take_over, replay=takes_replay) as (directory, elsewhere):
        base = load_config(directory / "config.yaml")
        config = _gone_on_with(base, settings, elsewhere.url or str(directory))
        refuse_changes(base, config)
        before = load(directory)
        if (config.stop, config.evaluation) == (base.stop, base.evaluation) and is_over(directory, before.result):
            elsewhere.settle(int(known_facts(directory).get("parts", 0)), config.checkpoint.keep)
            return Run(directory, before.result, objects)
        result = execute(config, objects, directory, callbacks, progress, profile, elsewhere=elsewhere)
        return Run(directory, result, objects)


def _gone_on_with(base: RunConfig, settings: Mapping[str, Any], run_dir: str) -> RunConfig:
    """The configuration of a run that was resumed with these settings. Raises ConfigError."""
    tree = base.model_dump(mode="json", by_alias=True)
    if any(str(key).startswith("stop") for key in settings):
        tree["stop"] = {}
    config, _ = resolve(None, {**settings, "run_dir": run_dir, "preset": base.preset or "none"}, tree)
    return config


def load(path: str | os.PathLike[str], *, env: Callable[..., Any] | None = None, network: Callable[..., Any] | None = None) -> Run:
    """A run that was made earlier, on this disk or (by its URL) in a store. Raises RunError.

    Args:
      env, network: the environment's factory and the network, where the run was started with objects that have no import path.
    """
    directory, said = find_run(path), list[str]()
    objects = {name: found for name, found in (("env", env), ("network", network)) if found is not None}
    run = Run(directory, read_result(directory, said), objects)
    for warning in said:
        warnings.warn(warning, RuntimeWarning, stacklevel=2)
    return run


def evaluate(
    run: str | os.PathLike[str],
    episodes: int = 100,
    seed: int = 0,
    video: str | Path | None = None,
    deterministic: bool = True,
    max_episode_steps: int | None = None,
) -> dict[str, Any]:
    """Play `episodes` episodes with the newest policy of a run, with seeds that `seed` names.

    Args:
      run: a run, or its path; `shoal.load(path, env=factory)` where it was trained on an object that has no import path.
      video: an mp4 of the first episode is written here.
      deterministic: the best action of every step; else actions are drawn, as `LoadedPolicy.predict` says.
      max_episode_steps: episodes are cut here. Without it, one of more than 200,000 steps is an EnvironmentFault.
    Returns:
      episodes, mean_return, std_return, iqm, ci95 [low, high], min, max, mean_length.
    """
    policy = run.policy() if isinstance(run, Run) else load(run).policy()
    return play(policy, episodes=episodes, seed=seed, video=video, deterministic=deterministic, max_episode_steps=max_episode_steps)


def check(target: str | Callable[..., Any], **settings: Any) -> CheckReport:
    """Look at an environment before training: interface, spaces, determinism, cost. Returns a report (findings with hints).

    It is played in a process of its own: one that hangs (env.step_timeout_seconds) or crashes is a finding like others.

    Raises:
      ConfigError: the environment cannot be found, or an extra is not installed.
    """
    from shoal.engines.checking import check as check_in_child

    objects, target_path, settings = split_objects(target, settings)
    config, _ = resolve(target_path, settings)
    return check_in_child(config, pickled(objects))


def replay(
    path: str | os.PathLike[str],
    *,
    env: Callable[..., Any] | None = None,
    network: Callable[..., Any] | None = None,
    algorithm: type[Any] | None = None,
    progress: Callable[[int], None] = lambda update: None,
) -> dict[str, Any]:
    """Execute a run again in this process, up to its newest checkpoint.

    Args:
      env, network, algorithm: the user's own, where the run was started with objects that have no import path.
      progress: called after each update with its number.
    Returns:
      run, updates, weights_sha256, expected_sha256, equal.
    Raises:
      RunError: the log of consumption has a gap, or the run did what cannot be executed again. CheckpointError: there is no whole checkpoint to compare
        with.
    """
    from shoal.engines.roles import UserObjects
    from shoal.training.repeating import repeat

    directory = find_run(path)
    config = load_config(directory / "config.yaml")
    objects = UserObjects(env=env, network=network, algorithm=algorithm)
    return {"run": path if is_url(path) else str(directory), **repeat(config, directory, objects, progress)}


__all__ = ["Run", "RunError", "SilentView", "check", "evaluate", "load", "replay", "resume", "train"]
