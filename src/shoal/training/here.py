"""A training whose roles run in this process (`actors: 0`)."""

from __future__ import annotations

from typing import Any

import torch

from shoal.engines.alarm import CallClock, limited
from shoal.engines.inline import InlineEngine
from shoal.engines.looking import look
from shoal.engines.plan import Plan
from shoal.engines.question import Played
from shoal.engines.roles import Blueprint, UserObjects
from shoal.engines.snippets import with_snippet
from shoal.errors import EnvironmentFault
from shoal.evaluation import load_policy
from shoal.experience.ring import Ring, allocate
from shoal.experience.schema import Schema
from shoal.training.facts import run_id
from shoal.training.outcome import is_evaluated, result_of
from shoal.training.playing import play
from shoal.training.preparing import Training, prepare


def train_here(training: Training) -> dict[str, Any]:
    """Returns the result. Torch has as many threads as the learner is to have, for as long as it lasts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(training.config.learner.threads)
    try:
        return _train(training, UserObjects(**training.objects))
    finally:
        torch.set_num_threads(threads)


def _train(training: Training, objects: UserObjects) -> dict[str, Any]:
    session, ring = prepare(training, _look(training, objects), _allocate)
    blueprint = Blueprint(session.config, session.spec, objects, run_id(training.directory), session.epoch)
    engine = InlineEngine(blueprint, session, ring, training.traces)
    training.wishes.armed = True
    result = result_of(session, engine.run(training.wishes), training.directory)
    training.wishes.armed = False
    if is_evaluated(training.config, result):
        policy = load_policy(training.directory, network=objects.network, environment=objects.env)
        evaluation = training.config.evaluation
        result["evaluation"] = play(policy, episodes=evaluation.episodes, seed=evaluation.seed)
    return result


def _look(training: Training, objects: UserObjects) -> dict[str, Any]:
    """What the environment and the policy look like (`engines.looking.look`); a fault comes with what was played up to it."""
    played, clock = Played(), CallClock()

    def tell(call: str, /, **what: Any) -> None:
        played(call, **what)
        clock(call)

    try:
        with limited(clock.age_seconds, training.config.env.step_timeout_seconds):
            return look(training.config, objects, tell)
    except EnvironmentFault as fault:
        raise with_snippet(fault, training.config, training.directory, {0: played.episodes}) from fault


def _allocate(schema: Schema, plan: Plan, weights: int) -> Ring:
    """A ring in this process's own memory."""
    return allocate(schema, plan.num_slots)
