"""Train, resume, load, evaluate, check: what `import shoal` offers, and what the command line calls.

The calling process is the supervisor; it imports torch only where all roles are to run in it (`actors: 0`).
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.config import ReplayConfig, RunConfig, actor_bounds
from shoal.engines.coordinator import Coordinator
from shoal.engines.elsewhere import Elsewhere
from shoal.engines.fleet import Fleet
from shoal.engines.local import LocalEngine
from shoal.engines.plan import Plan
from shoal.engines.session import ATTEMPTS_PER_PART, Session
from shoal.engines.sizes import check_memory, check_replay
from shoal.engines.snippets import with_snippet
from shoal.environments.make import check_registered
from shoal.errors import CheckpointError, ConfigError, EnvironmentFault, RunError, ShoalError, StorageError
from shoal.experience.limiter import Rate
from shoal.experience.ring import Ring, allocate
from shoal.experience.schema import Schema, rollout_schema
from shoal.files import CheckpointDirectory, Loaded, write_text_atomically
from shoal.locks import lock_run
from shoal.monitoring.live import SilentView, View, open_view
from shoal.monitoring.profile import TRACES, begin_profile, finish_profile
from shoal.monitoring.recorder import Callback, Recorder, lag_summary
from shoal.runs import find_run, new_run, old_run, read_result
from shoal.settings import adapt_actors, dump_config, load_config, resolve
from shoal.types import EnvironmentSpec, FieldSpec
from shoal.urls import is_url

if TYPE_CHECKING:
    from shoal.environments.findings import CheckReport
    from shoal.evaluation import LoadedPolicy

FACTS = "run.json"  # what else a run's bits depend on


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
    objects, target_path, settings = _split_objects(target, settings)
    config, preset = resolve(target_path, settings)
    config.preset = preset
    _check_callbacks(callbacks)
    with new_run(config) as run:
        return execute(config, objects, run.directory, callbacks, progress, profile, run.discard, run.elsewhere)


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
    _check_callbacks(callbacks)
    with old_run(path, take_over=take_over) as (directory, elsewhere):
        base = load_config(directory / "config.yaml")
        objects, _, settings = _split_objects(env, settings)
        if isinstance(path, Run):
            objects = {**path.objects, **objects}
        tree = base.model_dump(mode="json", by_alias=True)
        if any(str(key).startswith("stop") for key in settings):
            tree["stop"] = {}
        config, _ = resolve(None, {**settings, "run_dir": elsewhere.url or str(directory), "preset": base.preset or "none"}, tree)
        _refuse_changes(base, config)
        before = load(directory)
        if (config.stop, config.evaluation) == (base.stop, base.evaluation) and _is_over(before):
            elsewhere.settle(int(_known_facts(directory).get("parts", 0)), config.checkpoint.keep)
            return Run(directory, before.result, objects)
        return execute(config, objects, directory, callbacks, progress, profile, elsewhere=elsewhere)


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
    return _play(policy, episodes=episodes, seed=seed, video=video, deterministic=deterministic, max_episode_steps=max_episode_steps)


def _play(policy: LoadedPolicy, **how: Any) -> dict[str, Any]:
    """Episodes in this process, each call of an environment within its limit."""
    from shoal.engines.alarm import CallClock, limited
    from shoal.evaluation import evaluate as play

    clock = CallClock()
    with limited(clock.age_seconds, policy.env_config.step_timeout_seconds):
        return play(policy, tell=clock, **how)


def check(target: str | Callable[..., Any], **settings: Any) -> CheckReport:
    """Look at an environment before training: interface, spaces, determinism, cost. Returns a report (findings with hints).

    It is played in a process of its own: one that hangs (env.step_timeout_seconds) or crashes is a finding like others.

    Raises:
      ConfigError: the environment cannot be found, or an extra is not installed.
    """
    from shoal.engines.checking import check as check_in_child

    objects, target_path, settings = _split_objects(target, settings)
    config, _ = resolve(target_path, settings)
    return check_in_child(config, _pickled(objects))


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
    import torch

    from shoal.engines.replay import replay as execute
    from shoal.engines.roles import Blueprint, UserObjects
    from shoal.monitoring.store import RunReader

    directory = find_run(path)
    config = load_config(directory / "config.yaml")
    newest = CheckpointDirectory(directory / "checkpoints").newest()
    expected = newest.json("learner")
    facts = newest.json("coordinator")
    if facts.get("epoch", 0):
        raise RunError(
            f"{directory.name} diverged once and went back to a checkpoint; what it did since cannot be replayed from the beginning"
        )
    if facts.get("replay_lost", False):
        raise RunError(
            f"{directory.name} went on once from a checkpoint without the replay that it learns from (checkpoint.replay false), and filled it anew; "
            "what it did since cannot be replayed from the beginning"
        )
    with RunReader(directory / "run.db") as reader:
        log = dict(reader.consumed())
        spec = EnvironmentSpec.from_json(reader.meta()["spec"])
        given_up = {(event["group"], event["sequence"]): event["places"] for event in reader.events("given_up")}
    threads = torch.get_num_threads()
    torch.set_num_threads(config.learner.threads)
    try:
        objects = UserObjects(env=env, network=network, algorithm=algorithm)
        sha = execute(Blueprint(config, spec, objects, _run_id(directory)), log, int(expected["version"]), progress, given_up)
    finally:
        torch.set_num_threads(threads)
    wanted = expected["weights_sha256"]
    return {
        "run": path if is_url(path) else str(directory),
        "updates": expected["version"],
        "weights_sha256": sha,
        "expected_sha256": wanted,
        "equal": sha == wanted,
    }


# ---- one training ----------------------------------------------------------------------------------------------------
def execute(
    config: RunConfig,
    objects: dict[str, Any],
    directory: Path,
    callbacks: Sequence[Callback],
    progress: View | None,
    profile: bool = False,
    discard: Callable[[], None] | None = None,
    elsewhere: Elsewhere | None = None,
) -> Run:
    """Train what is resolved, in a directory that is a run's; `objects` stand for what the configuration only names (env, network, algorithm).

    `discard` is called where a new run was refused before anything ran. `elsewhere` is where else it is kept.
    """
    elsewhere = elsewhere or Elsewhere()
    view = progress if progress is not None else open_view()
    with contextlib.ExitStack() as stack:
        if progress is None:
            stack.callback(view.close)
        stack.enter_context(lock_run(directory))
        _known_facts(directory)  # damaged, it is refused before anything is changed
        checkpoints = CheckpointDirectory(directory / "checkpoints")
        loaded = checkpoints.newest() if checkpoints.paths() else None
        recorder = stack.enter_context(contextlib.closing(Recorder(config, directory, view, callbacks)))
        elsewhere.tell(recorder.event)
        if discard is None and loaded is None:
            recorder.event("warning", update=0, message="this run has no checkpoint: it begins again from the start")
        wants_end = stack.enter_context(_interrupts())
        traces = ""
        if profile:
            traces = _begin_profile(directory, recorder)
            stack.callback(_finish_profile, directory, traces, recorder)
        execute = _run_inline if config.actors == 0 else _run_local
        try:
            result = execute(config, objects, directory, loaded, recorder, wants_end, traces, elsewhere)
        except ShoalError as error:
            if isinstance(error, ConfigError) and discard is not None and not recorder.began:
                discard()
            recorder.failed(error)
            elsewhere.failed(recorder.event)
            raise
        except KeyboardInterrupt as interrupt:
            if discard is not None and not recorder.began:
                discard()
            interrupt.args = (_interrupted(recorder, resumed=discard is None),)
            raise
        try:
            write_text_atomically(directory / "result.json", json.dumps(result, indent=1))
        except RunError as error:  # the run is made all the same, and its checkpoint is whole
            recorder.event("warning", message=str(error))
        recorder.finish(result)
        _finish_elsewhere(elsewhere, recorder)
    return Run(directory, result, objects)


def _finish_elsewhere(elsewhere: Elsewhere, recorder: Recorder) -> None:
    """Nothing of the run is lost where this fails: it is whole on this disk."""
    recorder.flush()
    try:
        elsewhere.finish(recorder.event)
    except StorageError as error:
        recorder.failed(error)
        raise
    except KeyboardInterrupt as interrupt:
        interrupt.args = (
            f"interrupted while the end of the run was copied to {elsewhere.url}: it is whole on this disk, and `shoal resume {elsewhere.url}` on this machine copies it",
        )
        raise


def _begin_profile(directory: Path, recorder: Recorder) -> str:
    """The directory for traces; "" where the disk refuses."""
    try:
        return str(begin_profile(directory).absolute())
    except OSError as error:
        recorder.event("warning", message=f"there will be no profile.json: {error.strerror or error} ({directory / TRACES})")
        return ""


def _finish_profile(directory: Path, traces: str, recorder: Recorder) -> None:
    """The run is made, whatever becomes of its profile."""
    try:
        if traces:
            finish_profile(directory)
    except (OSError, RunError, ValueError) as error:
        recorder.event("warning", message=f"profile.json could not be written ({error}); the traces are in {traces}")


def _run_inline(
    config: RunConfig,
    objects: dict[str, Any],
    directory: Path,
    loaded: Loaded | None,
    recorder: Recorder,
    wants_end: _Wants,
    traces: str,
    elsewhere: Elsewhere,
) -> dict[str, Any]:
    if "env" not in objects:
        check_registered(config.env)
    import torch

    from shoal.engines.alarm import CallClock, limited
    from shoal.engines.inline import InlineEngine
    from shoal.engines.mains import look
    from shoal.engines.question import Played
    from shoal.engines.roles import Blueprint, UserObjects

    threads = torch.get_num_threads()
    torch.set_num_threads(config.learner.threads)
    try:
        handed = UserObjects(**objects)
        played, clock = Played(), CallClock()

        def tell(call: str, /, **what: Any) -> None:
            played(call, **what)
            clock(call)

        try:
            with limited(clock.age_seconds, config.env.step_timeout_seconds):
                facts = look(config, handed, tell)
        except EnvironmentFault as fault:
            raise with_snippet(fault, config, directory, {0: played.episodes}) from fault
        session, ring, run_id = _session(config, facts, directory, loaded, recorder, allocate_here, elsewhere)
        blueprint = Blueprint(session.config, session.spec, handed, run_id, session.epoch)
        engine = InlineEngine(blueprint, session, ring, traces)
        wants_end.armed = True
        result = _result(session, engine.run(wants_end), directory)
        wants_end.armed = False
        if _evaluates(config, result):
            from shoal.evaluation import load_policy

            policy = load_policy(directory, network=objects.get("network"), environment=objects.get("env"))
            result["evaluation"] = _play(policy, episodes=config.evaluation.episodes, seed=config.evaluation.seed)
        return result
    finally:
        torch.set_num_threads(threads)


def _run_local(
    config: RunConfig,
    objects: dict[str, Any],
    directory: Path,
    loaded: Loaded | None,
    recorder: Recorder,
    wants_end: _Wants,
    traces: str,
    elsewhere: Elsewhere,
) -> dict[str, Any]:
    run_id = _run_id(directory)
    fleet = _fleet(config, _pickled(objects), directory, run_id, traces, recorder)
    with contextlib.closing(LocalEngine(config, fleet, directory, traces)) as engine:
        engine.open()
        if "env" not in objects:
            check_registered(config.env)  # while the helper process imports torch
        session, _, _ = _session(config, engine.look(), directory, loaded, recorder, engine.allocate, elsewhere)
        wants_end.armed = True
        result = _result(session, engine.run(session, wants_end, wants_end.take_asked), directory)
        wants_end.armed = False
        path = session.checkpoint_path
        if path is not None and _evaluates(config, result):
            result["evaluation"] = engine.evaluate(path)
        return result


def _fleet(config: RunConfig, pickled: bytes | None, directory: Path, run_id: bytes, traces: str, recorder: Recorder) -> Fleet:
    """The processes of a run: on this machine, or on a cluster."""
    if config.engine == "local":
        return Fleet(config, pickled, directory, run_id, traces)
    from shoal.engines.ray_fleet import RayFleet

    return RayFleet(config, pickled, directory, run_id, traces, recorder.event)


def _evaluates(config: RunConfig, result: Mapping[str, Any]) -> bool:
    return config.evaluation.episodes > 0 and result["reason"] != "interrupted"


def allocate_here(schema: Schema, plan: Plan, weights: int) -> Ring:
    """A ring in this process's own memory."""
    return allocate(schema, plan.num_slots)


def _say_what_is_not_exact(spec: EnvironmentSpec, measured: Mapping[str, Any], recorder: Recorder) -> None:
    """Where the environment keeps a run from ending with the same bits after a kill or a resume."""
    if not measured.get("repeats", True):
        recorder.event(
            "warning",
            message=f"{spec.name} gave another observation for the same seed: after a kill or a resume the run goes on, but not with the same bits; "
            "call super().reset(seed=seed) and draw only from self.np_random",
        )
    if not spec.exact_restore:
        recorder.event(
            "warning",
            message=f"{spec.name} cannot be put back to an earlier state: after a kill or a resume the run goes on, but not with the same bits",
        )


def _session(
    config: RunConfig,
    facts: dict[str, Any],
    directory: Path,
    loaded: Loaded | None,
    recorder: Recorder,
    make_ring: Callable[[Schema, Plan, int], Ring],
    elsewhere: Elsewhere,
) -> tuple[Session, Ring, bytes]:
    """Everything that stands between what was found out about the environment and the first order."""
    spec = EnvironmentSpec.from_json(facts["spec"])
    fields = [FieldSpec(f["name"], f["dtype"], tuple(f["shape"]), f["axis"]) for f in facts["fields"]]
    config.mode = facts["mode"]
    config.env.form = facts["form"]  # measured once: a resumed run keeps it
    config.policy.inference = facts["inference"]
    more_actors = adapt_actors(config)
    replay = None if facts["replay"] is None else ReplayConfig.model_validate(facts["replay"])
    config.replay = replay or config.replay
    plan = Plan.of(config, None if facts["rate"] is None else Rate(**facts["rate"]))
    (directory / "result.json").unlink(missing_ok=True)  # of an earlier part, which may have had another configuration
    write_text_atomically(directory / "config.yaml", dump_config(config))
    schema = rollout_schema(spec, fields, plan.rollout_length, plan.group_size)
    actors = config.actors or 0
    if actors and config.autoscale is not None:
        actors = actor_bounds(config.autoscale)[1]
    if replay is not None:
        check_replay(plan, schema, replay)
    check_memory(plan, schema, facts["weights"], actors + (config.policy.inference == "server"), replay, config.learners)
    ring = make_ring(schema, plan, facts["weights"])
    session = Session(config, spec, Coordinator(plan, spec, ring, config.stop), directory, recorder, elsewhere=elsewhere)
    recorder.attach(session)
    if more_actors:
        recorder.event("scaled", actors=config.actors, reason="its environments wait")
    elif config.env.form == "threads" and 0 < (config.actors or 0) < plan.num_groups:
        recorder.event(
            "warning",
            message=f"the environments wait, and an actor steps its groups one after the other: {plan.num_groups} groups in {config.actors} actors "
            f"take {-(-plan.num_groups // (config.actors or 1))} times as long as with --actors {plan.num_groups}",
        )
    run_id = _run_id(directory)
    known = _known_facts(directory)
    build = facts["build"]
    part = int(known.get("parts", 0))
    session.coordinator.number_attempts_from(part * ATTEMPTS_PER_PART)
    if loaded is not None:
        session.load(loaded)
        session.coordinator.number_attempts_from(part * ATTEMPTS_PER_PART)
    if part:
        recorder.resumed()
    if loaded is not None:
        for warning in loaded.warnings:
            recorder.event("warning", message=warning)
        if known.get("build", build) != build:
            recorder.event("warning", message=f"this run was begun with {known['build']} and goes on with {build}: its bits may differ")
    _say_what_is_not_exact(spec, facts["measured"], recorder)
    write_text_atomically(
        directory / FACTS, json.dumps({**known, "parts": part + 1, "build": build, "measured": facts["measured"]}, indent=1)
    )
    for key, value in (("spec", spec.to_json()), ("schema", schema.describe()), ("schema_hash", schema.hash.hex()), ("build", build)):
        recorder.store.set_meta(key, value)
    elsewhere.begin(part, config.checkpoint.keep)
    return session, ring, run_id


def _result(session: Session, outcome: dict[str, Any], directory: Path) -> dict[str, Any]:
    """The object that `--json` prints."""
    c = session.coordinator
    seconds = session.seconds
    mean, p99, largest = lag_summary(c.lag)
    return {
        "run": session.elsewhere.url or str(directory),
        "reason": outcome["reason"],
        "env_steps": c.env_steps,
        "updates": c.version,
        "seconds": seconds,
        "env_steps_per_second": c.env_steps / seconds if seconds > 0 else 0.0,
        "mean_return": None if not c.returns else c.mean_return,
        "policy_version": c.version,
        "weights_sha256": outcome["weights_sha256"],
        "ledger": c.ledger.balance(),
        "lag": {"mean": mean, "p99": p99, "max": largest},
        "restarts": session.restarts,
        "skipped_steps": session.skipped_steps,
        **({"replay": c.replay_facts} if c.limiter is not None else {}),
        **({"network": network} if (network := session.network()) else {}),
    }


def _interrupted(recorder: Recorder, *, resumed: bool) -> str:
    """What an end at once leaves."""
    if recorder.began:
        return "interrupted: ended at once; `shoal resume` goes on from the newest checkpoint"
    return "interrupted before training " + ("went on: the run is as it was" if resumed else "began: nothing was kept")


# ---- helpers ---------------------------------------------------------------------------------------------------------
def _split_objects(target: str | Callable[..., Any] | None, settings: dict[str, Any]) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    """The user's own objects apart from what can be written down. Returns (objects, target, settings)."""
    objects: dict[str, Any] = {}
    settings = dict(settings)
    if callable(target):
        objects["env"] = target
    policy = settings.get("policy")
    network = policy.get("network") if isinstance(policy, Mapping) else settings.get("policy.network")
    if callable(network):
        objects["network"] = network
    algorithm = settings.get("algorithm")
    named = algorithm.get("name") if isinstance(algorithm, Mapping) else algorithm
    if isinstance(named, type):
        objects["algorithm"] = named
    return objects, target, settings


def _check_callbacks(callbacks: object) -> None:
    """Raises ConfigError for what is no list of functions."""
    if isinstance(callbacks, Sequence) and all(callable(callback) for callback in callbacks):
        return
    wrong = [callback for callback in callbacks if not callable(callback)] if isinstance(callbacks, Sequence) else [callbacks]
    raise ConfigError(f"callbacks: a list of functions was expected, such as callbacks=[watch], got {wrong[0]!r}")


def _pickled(objects: dict[str, Any]) -> bytes | None:
    if not objects:
        return None
    import cloudpickle

    try:
        return bytes(cloudpickle.dumps(objects))
    except Exception as error:
        raise ConfigError(
            f"the environment, network or algorithm that was passed cannot be sent to other processes: {error}; "
            "pass a function that makes it, or an import path"
        ) from error


def _is_over(run: Run) -> bool:
    """Whether a run ended by its stop condition, and stands where its result says."""
    if run.result.get("reason") in (None, "interrupted"):
        return False
    with contextlib.suppress(CheckpointError):
        return CheckpointDirectory(run.path / "checkpoints").newest().update == run.result.get("updates")
    return False


def _refuse_changes(before: RunConfig, now: RunConfig) -> None:
    """Only how a run ends, where its roles run and how it saves may change on the way."""
    free = {"stop", "engine", "ray", "actors", "autoscale", "checkpoint", "evaluation", "run_dir", "preset", "device"}
    old, new = (_flat({k: v for k, v in c.model_dump(mode="json", by_alias=True).items() if k not in free}) for c in (before, now))
    for key in old | new:
        if old.get(key) != new.get(key):
            raise ConfigError(f"{key} was {old.get(key)} when the run began and cannot become {new.get(key)}; start a new run for it")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def _known_facts(directory: Path) -> dict[str, Any]:
    path = directory / FACTS
    try:
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        bytes.fromhex(known.get("run_id", ""))
    except (ValueError, AttributeError, TypeError) as error:
        raise RunError(
            f"{path} is damaged: {error}. Move it away and resume again: the run goes on under a new id, and its builds are not compared"
        ) from error
    return dict(known)


def _run_id(directory: Path) -> bytes:
    """16 bytes that name the run in every envelope; made once."""
    known = _known_facts(directory)
    if "run_id" not in known:
        known["run_id"] = secrets.token_hex(16)
        write_text_atomically(directory / FACTS, json.dumps(known))
    return bytes.fromhex(known["run_id"])


class _Wants:
    """What the user's signals ask for. Not armed: the first Ctrl-C ends at once, since nothing runs yet."""

    def __init__(self) -> None:
        self.armed = False
        self.wanted = False
        self.asked = False

    def __call__(self) -> bool:
        return self.wanted

    def take_asked(self) -> bool:
        """Whether somebody wants to know who waits for whom, since the last call."""
        asked, self.asked = self.asked, False
        return asked

    def signalled(self, number: int, frame: object) -> None:
        if number == signal.SIGUSR1:
            self.asked = True
            return
        if self.wanted or not self.armed:
            raise KeyboardInterrupt
        self.wanted = True


@contextlib.contextmanager
def _interrupts() -> Iterator[_Wants]:
    """Ctrl-C, SIGTERM or SIGHUP once: end well, with a checkpoint; twice: at once. Under nohup, SIGHUP stays ignored. SIGUSR1: say who waits for
    whom, unless the caller uses it. In a thread, only the caller can end the run."""
    wants = _Wants()
    if threading.current_thread() is not threading.main_thread():
        yield wants
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    if signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:
        numbers.append(signal.SIGUSR1)
    before = {number: signal.signal(number, wants.signalled) for number in numbers}
    try:
        yield wants
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


__all__ = ["Run", "RunError", "SilentView", "check", "evaluate", "load", "replay", "resume", "train"]
