"""What actors do with a policy's memory, row by row, is what a learner does with it, unrolled: in every form of an environment.

Legend: T rows, B environments.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from shoal.algorithms.base import evaluate_TN
from shoal.config import RunConfig
from shoal.engines.looking import look
from shoal.engines.replay import WeightHistory
from shoal.engines.roles import Blueprint, UserObjects
from shoal.environments.probe import probe
from shoal.errors import ConfigError
from shoal.experience.envelope import Identity
from shoal.experience.group_state import GroupHistory
from shoal.experience.ring import allocate
from shoal.learners.assemble import assemble
from shoal.settings import resolve

T, B, ROLLOUTS = 24, 4, 6


def dawdling() -> gymnasium.Env[Any, Any]:
    """Environments that are ready at moments of their own."""

    class Dawdling(gymnasium.Wrapper[Any, Any, Any, Any]):
        def step(self, action: Any) -> Any:
            time.sleep(float(self.np_random.random()) * 0.002)
            return super().step(action)

    return Dawdling(gymnasium.make("CartPole-v1", max_episode_steps=17))


@pytest.mark.parametrize("kind", ["lstm", "gru"])
@pytest.mark.parametrize(("form", "mode"), [("python", "sync"), ("native", "sync"), ("threads", "async")])
def test_the_behaviours_log_probabilities_are_those_of_the_unroll(form: str, mode: str, kind: str, tmp_path: Path) -> None:
    config = RunConfig.model_validate(
        {
            "env": {"id": "CartPole-v1", "form": form, "max_episode_steps": 17},
            "policy": {"memory": kind, "memory_size": 8},
            "sampling": {"groups": 1, "group_size": B, "rollout_length": T},
            "mode": mode,
        }
    )
    factory = dawdling if form == "threads" else None
    blueprint = Blueprint(config, probe(config.env, factory).spec, UserObjects(env=factory), bytes(16))
    policy = blueprint.policy()
    ring, weights = allocate(blueprint.schema(policy), 1), WeightHistory(blueprint.layout(policy).size)
    rng = np.random.default_rng(0)
    flat = weights.begin(0)
    flat[:] = rng.normal(0.0, 0.4, flat.shape)  # so that the state is felt
    for name, array in blueprint.layout(policy).views(flat).items():
        dict(policy.named_parameters())[name].data.copy_(torch.from_numpy(array.copy()))
    behaviour = blueprint.behaviour(weights)
    behaviour.refresh()
    actor = blueprint.actor(ring, behaviour)
    states = {name: value.numpy() for name, value in policy.initial_state(B).items()}
    actor.restore(0, GroupHistory(B, (), "int64", states).state_at(0))
    ends = carried = 0
    for sequence in range(ROLLOUTS):
        slot = actor.fill(0, Identity(0, sequence, 0))
        batch = assemble([slot], 0, 10)
        now = evaluate_TN(policy, batch)  # type: ignore[arg-type]
        valid = batch.valid_TN
        torch.testing.assert_close(now.log_prob_TN[valid], batch.log_prob_TN[valid], rtol=1e-4, atol=1e-4)
        ends += int(batch.ended_TN.sum())
        carried += int((slot.rows_used() < T).sum())
        forgotten = batch.policy_state["policy_state/h"].abs().sum(1) > 0
        assert sequence == 0 or forgotten.any()
    actor.close()
    assert ends >= ROLLOUTS
    assert (carried > 0) == (form == "threads")


@pytest.mark.parametrize(("name", "environment"), [("dqn", "CartPole-v1"), ("sac", "Pendulum-v1"), ("td3", "Pendulum-v1")])
def test_what_learns_from_a_replay_refuses_a_memory(name: str, environment: str) -> None:
    settings = {"env": {"id": environment}, "algorithm": {"name": name}, "policy": {"memory": "lstm", "activation": "relu"}}
    with pytest.raises(
        ConfigError, match=f"^policy.memory: {name} learns from a replay, and takes this at its default only; .* or take r2d2"
    ):
        look(RunConfig.model_validate(settings), UserObjects())


@pytest.mark.parametrize(
    ("algorithm", "more", "said"),
    [
        ("r2d2", {"policy": {"memory": "none"}}, r"policy.memory: r2d2 trains a policy with memory; take lstm or gru"),
        ("r2d2", {"replay": {"sequence_length": None}}, r"replay.sequence_length: r2d2 learns from sequences"),
        (
            "dqn",
            {"replay": {"sequence_length": 40}},
            r"replay.sequence_length: dqn learns from a replay, and takes this at its default only; .* or take r2d2",
        ),
        (
            "dqn",
            {"replay": {"burn_in": 2}},
            r"replay.burn_in: dqn learns from a replay, and takes this at its default only; .* or take r2d2",
        ),
        ("r2d2", {"policy": {"normalise_observations": True}}, r"policy.normalise_observations: r2d2 learns from a replay"),
        ("r2d2", {"policy": {"share_encoder": False}}, r"policy.share_encoder: r2d2 learns from a replay, .* default only; leave it out$"),
        ("dqn", {"policy": {"share_encoder": True}}, r"policy.share_encoder: dqn learns from a replay, .* default only; leave it out$"),
        ("sac", {"policy": {"log_std_init": -1.0}}, r"policy.log_std_init: sac learns from a replay, .* default only; leave it out$"),
        ("r2d2", {"replay": {"capacity_steps": 600}}, r"replay.learning_starts: the replay holds 600 env steps"),
    ],
)
def test_sequences_are_for_policies_with_memory_and_these_for_sequences(algorithm: str, more: dict[str, Any], said: str) -> None:
    config, _ = resolve("CartPole-v1", {"algorithm": algorithm, "preset": "none", **more})
    if more.get("replay", {}).get("sequence_length", 0) is None:
        config.replay.sequence_length = None
    with pytest.raises(ConfigError, match=f"^{said}"):
        look(config, UserObjects())


def test_learning_from_sequences_starts_no_sooner_than_there_are_any() -> None:
    config, _ = resolve("CartPole-v1", {"algorithm": "r2d2", "preset": "none", "replay.learning_starts": 10, "replay.n_step": 2})
    found = look(config, UserObjects())
    sampling = config.sampling
    assert (sampling.groups, sampling.group_size, config.replay.sequence_length) == (4, 4, 40)
    assert found["replay"]["learning_starts"] == found["rate"]["learning_starts"] == 4 * 4 * 40
    assert found["rate"]["batch_size"] == 32 * 30  # steps that are trained
    assert found["replay"]["samples_per_insert"] == pytest.approx(0.05 * 32 * 30)
    assert {field["name"] for field in found["fields"]} == {"action", "policy_state/h", "policy_state/c"}
