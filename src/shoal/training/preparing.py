"""Everything that stands between what was found out about an environment and the first order of its training."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.config import ReplayConfig, RunConfig, actor_bounds
from shoal.engines.coordinator import Coordinator
from shoal.engines.elsewhere import Elsewhere
from shoal.engines.plan import Plan
from shoal.engines.session import ATTEMPTS_PER_PART, Session
from shoal.engines.sizes import check_memory, check_replay
from shoal.experience.limiter import Rate
from shoal.experience.ring import Ring
from shoal.experience.schema import Schema, rollout_schema
from shoal.files import FACTS, Loaded, write_text_atomically
from shoal.monitoring.recorder import Recorder
from shoal.settings import adapt_actors, dump_config
from shoal.training.facts import known_facts, run_id
from shoal.training.wishes import Wishes
from shoal.types import EnvironmentSpec, FieldSpec


@dataclass(frozen=True)
class Training:
    """What a training is given, wherever its roles run.

    Attributes:
      config: resolved; what was measured is written into it. objects: the user's own, for what it only names (env, network, algorithm).
      loaded: the checkpoint that it goes on from, if there is one.
      wishes: what the user's signals ask for. traces: the directory for traces; "" for none.
      elsewhere: where else the run is kept.
    """

    config: RunConfig
    objects: Mapping[str, Any]
    directory: Path
    loaded: Loaded | None
    recorder: Recorder
    wishes: Wishes
    traces: str
    elsewhere: Elsewhere


def prepare(training: Training, facts: dict[str, Any], make_ring: Callable[[Schema, Plan, int], Ring]) -> tuple[Session, Ring]:
    """The session, standing where the checkpoint says, and the memory for its rollouts. The run's files say what it was begun with.

    facts: of `engines.looking.look`.
    """
    config, directory, recorder = training.config, training.directory, training.recorder
    more_actors = _take_in(facts, config)
    spec = EnvironmentSpec.from_json(facts["spec"])
    plan = Plan.of(config, None if facts["rate"] is None else Rate(**facts["rate"]))
    (directory / "result.json").unlink(missing_ok=True)  # of an earlier part, which may have had another configuration
    write_text_atomically(directory / "config.yaml", dump_config(config))
    schema = rollout_schema(spec, _fields(facts), plan.rollout_length, plan.group_size)
    _check_sizes(config, facts, plan, schema)
    ring = make_ring(schema, plan, facts["weights"])
    session = Session(config, spec, Coordinator(plan, spec, ring, config.stop), directory, recorder, elsewhere=training.elsewhere)
    recorder.attach(session)
    _say_who_waits(config, plan, recorder, more_actors=more_actors)
    run_id(directory)  # made where there is none yet
    known, build = known_facts(directory), facts["build"]
    part = int(known.get("parts", 0))
    _go_on(session, training.loaded, part)
    if part:
        recorder.resumed()
    if training.loaded is not None:
        _say_what_was_found(training.loaded, known, build, recorder)
    _say_what_is_not_exact(spec, facts["measured"], recorder)
    write_text_atomically(
        directory / FACTS, json.dumps({**known, "parts": part + 1, "build": build, "measured": facts["measured"]}, indent=1)
    )
    for key, value in (("spec", spec.to_json()), ("schema", schema.describe()), ("schema_hash", schema.hash.hex()), ("build", build)):
        recorder.store.set_meta(key, value)
    training.elsewhere.begin(part, config.checkpoint.keep)
    return session, ring


def _take_in(facts: Mapping[str, Any], config: RunConfig) -> bool:
    """What was measured becomes part of the configuration. Returns whether there are other actors for it."""
    config.mode = facts["mode"]
    config.env.form = facts["form"]  # measured once: a resumed run keeps it
    config.policy.inference = facts["inference"]
    more_actors = adapt_actors(config)
    if facts["replay"] is not None:
        config.replay = ReplayConfig.model_validate(facts["replay"])
    return more_actors


def _fields(facts: Mapping[str, Any]) -> list[FieldSpec]:
    """What the policy emits."""
    return [FieldSpec(f["name"], f["dtype"], tuple(f["shape"]), f["axis"]) for f in facts["fields"]]


def _check_sizes(config: RunConfig, facts: Mapping[str, Any], plan: Plan, schema: Schema) -> None:
    """Raises ConfigError where the run needs more memory than there is, or a replay that cannot be."""
    actors = config.actors or 0
    if actors and config.autoscale is not None:
        actors = actor_bounds(config.autoscale)[1]
    replay = None if facts["replay"] is None else config.replay
    if replay is not None:
        check_replay(plan, schema, replay)
    check_memory(plan, schema, facts["weights"], actors + (config.policy.inference == "server"), replay, config.learners)


def _say_who_waits(config: RunConfig, plan: Plan, recorder: Recorder, *, more_actors: bool) -> None:
    """Where the environments wait: that there are more actors for that, or that there could be."""
    if more_actors:
        recorder.event("scaled", actors=config.actors, reason="its environments wait")
    elif config.env.form == "threads" and 0 < (config.actors or 0) < plan.num_groups:
        recorder.event(
            "warning",
            message=f"the environments wait, and an actor steps its groups one after the other: {plan.num_groups} groups in {config.actors} actors "
            f"take {-(-plan.num_groups // (config.actors or 1))} times as long as with --actors {plan.num_groups}",
        )


def _go_on(session: Session, loaded: Loaded | None, part: int) -> None:
    """From the checkpoint; no attempt gets a number that an earlier part of the run may have given."""
    session.coordinator.number_attempts_from(part * ATTEMPTS_PER_PART)
    if loaded is not None:
        session.load(loaded)
        session.coordinator.number_attempts_from(part * ATTEMPTS_PER_PART)


def _say_what_was_found(loaded: Loaded, known: Mapping[str, Any], build: Any, recorder: Recorder) -> None:
    """What a resumed run is to know of its checkpoint, and of the build that began it."""
    for warning in loaded.warnings:
        recorder.event("warning", message=warning)
    if known.get("build", build) != build:
        recorder.event("warning", message=f"this run was begun with {known['build']} and goes on with {build}: its bits may differ")


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
